"""Presets: modules."""

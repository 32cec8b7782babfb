"""Presets: selection."""

"""Presets: reparametrization."""

"""Adapters to other frameworks, each imported by name only."""

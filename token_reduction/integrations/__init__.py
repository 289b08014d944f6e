"""Adapters to other frameworks; nothing of theirs is imported before it is used."""

"""Measuring a topology from inside: patterns of messages, the kind that explains their times, and what computing costs."""

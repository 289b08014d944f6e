"""Mixture-of-experts parallel folding. Nothing is public here yet: the package holds its name and place in the house."""

__all__: list[str] = []

"""Mixture-of-experts parallel folding."""

from moe.folding import Folding

__all__ = ["Folding"]

"""Mixture-of-experts parallel folding."""

from moe.folding import Folding
from moe.router import Router, RouterConfig, Routing

__all__ = ["Folding", "Router", "RouterConfig", "Routing"]

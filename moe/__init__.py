"""Mixture-of-experts parallel folding."""

from moe.dispatch import Dispatched, build_dispatcher
from moe.folding import Folding
from moe.router import Router, RouterConfig, Routing
from moe.traffic import traffic

__all__ = ["Dispatched", "Folding", "Router", "RouterConfig", "Routing", "build_dispatcher", "traffic"]

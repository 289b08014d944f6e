"""Mixture-of-experts parallel folding: two mappings over the same ranks, and dispatchers that send each token once."""

from moe.dispatch import Dispatched, build_dispatcher
from moe.experts import Experts, SharedExperts
from moe.folding import Folding
from moe.layer import MoELayer
from moe.router import Router, RouterConfig, Routing
from moe.traffic import traffic

__all__ = [
    "Dispatched",
    "Experts",
    "Folding",
    "MoELayer",
    "Router",
    "RouterConfig",
    "Routing",
    "SharedExperts",
    "build_dispatcher",
    "traffic",
]

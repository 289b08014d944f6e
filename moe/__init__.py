"""Mixture-of-experts parallel folding: two mappings over the same ranks, and dispatchers that send each token once."""

from __future__ import annotations

from typing import Any

from moe.dispatch import Dispatched, build_dispatcher
from moe.experts import Experts, SharedExperts
from moe.folding import Folding
from moe.layer import MoELayer
from moe.placement import Placement, co_activation, place
from moe.router import Router, RouterConfig, Routing
from moe.traffic import traffic

__all__ = [
    "Dispatched",
    "Experts",
    "Folding",
    "MoELayer",
    "Placement",
    "Router",
    "RouterConfig",
    "Routing",
    "SharedExperts",
    "build_dispatcher",
    "co_activation",
    "place",
    "traffic",
]


def __getattr__(name: str) -> Any:
    """`moe.megatron` needs megatron-core, so it is imported when it is asked for."""
    if name == "megatron":
        from importlib import import_module

        return import_module("moe.megatron")
    raise AttributeError(f"module 'moe' has no attribute {name!r}")

"""Which schedule: for now the one whose busiest rank moves the fewest bytes; on a tie the one that needs the least memory.

The rule is exact in bytes and blind to links: it takes every link for equal and shared. A choice by measured or described
links (Topology) builds on the same plans.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from tokenring.merge import accumulator_dtype
from tokenring.plan import Plan
from tokenring.problem import Problem
from tokenring.schedules import builder
from tokenring.shape import AttentionShape
from tokenring.step import Step, Transfer

if TYPE_CHECKING:
    from tokenring.topology import Topology

PREFERENCE = ("ring", "biring", "tokenring", "gather")
BACKWARD_PREFERENCE = ("ring:direct", "biring", "tokenring", "gather")
SAMPLED_RANKS = 32


@lru_cache(maxsize=1024)
def choose_plan(
    schedule: str,
    problem: Problem,
    shape: AttentionShape,
    partial_dtype: torch.dtype | None = None,
    topology: Topology | None = None,
) -> Plan:
    """The plan of a schedule by name, or of the one that "auto" picks, in the problem's direction."""
    preference = BACKWARD_PREFERENCE if problem.backward else PREFERENCE
    if schedule != "auto":
        return _plan(schedule, problem, shape, partial_dtype)
    plans = {name: _plan(name, problem, shape, partial_dtype) for name in preference}
    busiest = {name: _busiest(plan) for name, plan in plans.items()}
    best = min(preference, key=lambda name: busiest[name])
    why = "auto: the busiest rank sends and receives " + ", ".join(f"{busiest[n]} bytes with {n}" for n in preference)
    return replace(plans[best], why=why)


def _plan(name: str, problem: Problem, shape: AttentionShape, partial_dtype: torch.dtype | None) -> Plan:
    if problem.backward and name == "ring":
        partial_dtype = accumulator_dtype(shape.dtype)
    return Plan(name, problem, shape, builder(name, problem.world, problem.backward), partial_dtype=partial_dtype)


def check_name(schedule: str, world: int, backward: bool) -> None:
    """Refuse a schedule that does not exist in this direction, or not for so many ranks."""
    if schedule != "auto":
        builder(schedule, world, backward)


def _busiest(plan: Plan) -> int:
    """Bytes through the busiest of all ranks, or of `SAMPLED_RANKS` evenly spread ones where there are more."""
    world = plan.world
    ranks = (
        {i * (world - 1) // max(1, SAMPLED_RANKS - 1) for i in range(SAMPLED_RANKS)}
        if world > SAMPLED_RANKS
        else range(world)
    )
    return max(
        sum(_moved(plan, transfers) for step in plan.steps(rank) for transfers in _both_ways(step)) for rank in ranks
    )


def _both_ways(step: Step) -> tuple[tuple[Transfer, ...], ...]:
    return (*step.sends, *step.receives)


def _moved(plan: Plan, transfers: tuple[Transfer, ...]) -> int:
    return sum(plan.transfer_bytes(t) for t in transfers)

"""Which schedule "auto" takes.

With a topology, the one whose simulated time is least (`tokenring.simulation`): every flat schedule, and the meshes, Ulysses
forms and, between nodes, hybrids that fit the world. Without one, the flat schedule whose busiest rank moves the fewest bytes:
exact in bytes and blind to links, as if all were equal and shared. On a tie the one that needs the least memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import sqrt
from typing import TYPE_CHECKING

import torch

from tokenring.merge import accumulator_dtype
from tokenring.plans.plan import Plan
from tokenring.plans.problem import Problem
from tokenring.plans.shape import AttentionShape
from tokenring.plans.step import Step, Transfer
from tokenring.schedules import builder

if TYPE_CHECKING:
    from tokenring.topology import Topology

PREFERENCE = ("ring", "biring", "tokenring", "gather")
BACKWARD_PREFERENCE = ("ring:direct", "biring", "tokenring", "gather")
SAMPLED_RANKS = 32
SAMPLED_STEPS = 2048
"""Ranks looked at times the world, which is about what building their plans costs; four ranks at least."""
MOST_OF_A_KIND = 2


@lru_cache(maxsize=1024)
def choose_plan(
    schedule: str,
    problem: Problem,
    shape: AttentionShape,
    partial_dtype: torch.dtype | None = None,
    topology: Topology | None = None,
) -> Plan:
    """The plan of a schedule by name, or of the one that "auto" picks, in the problem's direction."""
    if topology is not None and topology.world != problem.world:
        raise ValueError(
            f"the topology has {topology.world} ranks and the call {problem.world}; give one of the same world"
        )
    if schedule != "auto":
        return _plan(schedule, problem, shape, partial_dtype)
    if topology is not None:
        return _quickest(problem, shape, partial_dtype, topology)
    preference = BACKWARD_PREFERENCE if problem.backward else PREFERENCE
    plans = {name: _plan(name, problem, shape, partial_dtype) for name in preference}
    busiest = {name: _busiest(plan) for name, plan in plans.items()}
    best = min(preference, key=lambda name: busiest[name])
    why = "auto: the busiest rank sends and receives " + ", ".join(f"{busiest[n]} bytes with {n}" for n in preference)
    return replace(plans[best], why=why)


def candidates(problem: Problem, topology: Topology) -> tuple[str, ...]:
    """The schedules that "auto" compares on a topology, those of least memory first."""
    world, group = problem.world, problem.q_heads / problem.kv_heads
    names = [*(BACKWARD_PREFERENCE if problem.backward else PREFERENCE)]
    sizes = [size for size in range(2, world) if world % size == 0]
    best_mesh = sorted(sizes, key=lambda a: abs(a - sqrt(world / group)))[:MOST_OF_A_KIND]
    names += [f"mesh:{a}x{world // a}" for a in best_mesh]
    if world > 1 and problem.q_heads >= world:
        names.append("ulysses")
    by_heads = [size for size in sizes if size <= problem.q_heads]
    names += [
        f"usp:{u}x{world // u}" for u in sorted(by_heads, key=lambda u: abs(u - problem.kv_heads))[:MOST_OF_A_KIND]
    ]
    if topology.kind == "nodes" and 1 < topology.intra.world < world:
        inner = ("ring:direct" if problem.backward else "ring", "tokenring", "gather")
        names += [f"hybrid:ring/{each}@{topology.intra.world}" for each in inner]
        names += [f"hybrid:tokenring/{each}@{topology.intra.world}" for each in ("tokenring", "gather")]
    return tuple(names)


def _quickest(problem: Problem, shape: AttentionShape, partial_dtype: torch.dtype | None, topology: Topology) -> Plan:
    from tokenring.simulation.simulate import simulate

    plans = {name: _plan(name, problem, shape, partial_dtype) for name in candidates(problem, topology)}
    seconds = {name: simulate(plan, topology).seconds for name, plan in plans.items()}
    best = min(plans, key=lambda name: seconds[name])
    listed = ", ".join(f"{name} {1e3 * seconds[name]:.4g} ms" for name in sorted(plans, key=lambda name: seconds[name]))
    links = f"{topology.kind} of {topology.world} at {topology.gbytes_per_s:.4g} GB/s"
    return replace(plans[best], why=f"auto: modelled on {links}: {listed}")


def _plan(name: str, problem: Problem, shape: AttentionShape, partial_dtype: torch.dtype | None) -> Plan:
    if problem.backward and name == "ring":
        partial_dtype = accumulator_dtype(shape.dtype)
    return Plan(name, problem, shape, builder(name, problem.world, problem.backward), partial_dtype=partial_dtype)


def check_name(schedule: str, world: int, backward: bool) -> None:
    """Refuse a schedule that does not exist in this direction, or not for so many ranks."""
    if schedule != "auto":
        builder(schedule, world, backward)


def _busiest(plan: Plan) -> int:
    """Bytes through the busiest of all ranks, or of some evenly spread ones in a larger world."""
    world = plan.world
    count = min(world, SAMPLED_RANKS, max(4, SAMPLED_STEPS // world))
    ranks = {i * (world - 1) // max(1, count - 1) for i in range(count)}
    # A large world's plans are looked at and dropped: kept, they would only weigh on the garbage collector.
    built = (plan.steps(rank) if world <= SAMPLED_RANKS else plan.builder(plan.problem, rank) for rank in ranks)
    return max(sum(_moved(plan, transfers) for step in steps for transfers in _both_ways(step)) for steps in built)


def _both_ways(step: Step) -> tuple[tuple[Transfer, ...], ...]:
    return (*step.sends, *step.receives)


def _moved(plan: Plan, transfers: tuple[Transfer, ...]) -> int:
    return sum(plan.transfer_bytes(t) for t in transfers)

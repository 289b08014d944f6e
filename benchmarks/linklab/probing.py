"""Does the library find out by itself what the lab's links are, and choose by it as it does by the true ones?"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass

import torch.distributed as dist

import tokenring as tr
from benchmarks.linklab.cells import Cell, model
from benchmarks.linklab.crew import hire
from benchmarks.linklab.lab import build
from benchmarks.linklab.raw import link_rates
from benchmarks.linklab.wiring import Wiring

SHAPES = tuple(itertools.product((1, 4), (1.0, 0.25), ("full", "causal"), ("forward", "backward")))
"""Query heads per key head, Sq / Skv, mask, direction: what a choice is asked for."""


@dataclass(frozen=True)
class Probed:
    """One wiring: its true kind and rates, what the probe found, and what choosing by that costs."""

    topology: str
    mbit: float
    found: str
    rate_error: float
    """Mean of |found / true - 1| over the ordered pairs of ranks, of what one message alone reaches."""
    choices: int
    same: int
    """Choices of "auto" that are the same by the found topology as by the true one."""
    worst: float
    """The largest time, by the true topology, of a choice by the found one over that of the choice by the true one."""


def find(rank: int, world: int, seconds: float) -> dict:
    """A crew task: the probe, and nothing but the group to tell it where it is."""
    return tr.Topology.probe(dist.group.WORLD, seconds=seconds, compute=False).to_dict()


def probe(wiring: Wiring, seconds: float) -> Probed:
    """Build a wiring, probe it from inside, compare."""
    with build(wiring) as lab, hire(lab) as crew:
        true = model(wiring, link_rates(crew))
        found = tr.Topology.from_dict(crew.run(find, seconds)[0])
    return Probed(
        wiring.name,
        min(wiring.shaped.values()),
        found.kind if found.kind != "nodes" else f"nodes:{_sizes(found)}",
        statistics.mean(abs(found.rate(*pair) / true.rate(*pair) - 1) for pair in wiring.ways),
        *_choices(wiring, true, found),
    )


def _choices(wiring: Wiring, true: tr.Topology, found: tr.Topology) -> tuple[int, int, float]:
    same, worst = 0, 1.0
    for gqa, ratio, mask, direction in SHAPES:
        cell = Cell(
            topology=wiring.name, world=wiring.world, gqa=gqa, ratio=ratio, mask=mask, direction=direction, kv_heads=64
        )
        wanted, chosen = (cell.plan("auto", topology) for topology in (true, found))
        same += wanted.schedule == chosen.schedule
        worst = max(worst, chosen.simulate(true).seconds / wanted.simulate(true).seconds)
    return len(SHAPES), same, worst


def _sizes(topology: tr.Topology) -> str:
    nodes = [topology.node(rank) for rank in range(topology.world)]
    return "x".join(map(str, (len(set(nodes)), nodes.count(nodes[0]))))


def table(rows: list[Probed]) -> str:
    """One line a wiring."""
    lines = [
        f"  {'wiring':<12} {'Mbit/s':>7} {'found':<12} {'rates off by':>12} {'same choice':>12} {'worst choice':>12}"
    ]
    lines += [
        f"  {row.topology:<12} {row.mbit:>7g} {row.found:<12} {row.rate_error:>12.1%} "
        f"{f'{row.same} of {row.choices}':>12} {row.worst:>12.2f}"
        for row in rows
    ]
    return "\n".join(lines)

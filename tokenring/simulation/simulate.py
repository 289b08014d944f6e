"""How long a plan takes on a topology: an event simulation of every rank's program, in the executor's order.

A message moves once its receive is open and its send is pushed, after the one before it between the same two ranks on the
same lane; its bytes share links with all that move at the time (`tokenring.links.flows`), its latency follows. A rank goes through
its tasks (`tokenring.simulation.tasks`) one by one; a wait ends when all that the exchange brings is there and all that it takes is
gone. While messages of a rank move, it computes at (1 - slowdown) of its rate.

Up to EXACT_WORLD ranks all are simulated. In a larger world one block of ranks (a node, or one rank) stands for all: exact
where every block does the same, as under a full mask. Where blocks differ, as under a causal one, each task and message takes
the largest size among some sampled blocks: a rank waits for the slowest around it sooner or later. Grids of ranks (mesh, usp,
hybrid) on the links of one large ring are the roughest: neighbours in a grid are not equally far apart there.
"""

from __future__ import annotations

from dataclasses import replace

from tokenring.links.costs import Costs
from tokenring.plans.plan import Plan
from tokenring.simulation.clock import Clock
from tokenring.simulation.fabric import Fabric, block
from tokenring.simulation.tasks import Key, Tasks, tasks
from tokenring.simulation.timeline import Timeline
from tokenring.topology import Topology

EXACT_WORLD = 64
MOST_BLOCKS = 6
SAMPLED_STEPS = 6144
"""Ranks of all sampled blocks times the world, which is about how long their plans take to build; at least two blocks."""
NO_COSTS = Costs()


def simulate(plan: Plan, topology: Topology, *, exact: bool | None = None) -> Timeline:
    """The modelled time of a plan, of every rank and link.

    Args:
        plan: for as many ranks as the topology has.
        topology: links, and in its `costs` what computing costs; without a compute rate only communication is modelled.
        exact: True simulates all ranks however many; False a block that stands for all; None decides by the world.

    >>> import tokenring as tr
    >>> shape = tr.AttentionShape(1, 4096, 4096, q_heads=8, kv_heads=8, head_dim=64)
    >>> ring = tr.plan("ring", world=4, shape=shape, layout="contiguous", mask="full")
    >>> round(simulate(ring, Topology.mesh(4, 1.0)).seconds, 9)  # three hops of 1024 rows x 2 x 8 heads x 64 x 2 bytes
    0.006291456
    """
    if topology.world != plan.world:
        raise ValueError(f"the plan has {plan.world} ranks, the topology {topology.world}; give one of the same world")
    costs = topology.costs or NO_COSTS
    period = plan.world if exact or (exact is None and plan.world <= EXACT_WORLD) else block(topology)
    variants = _variants(plan, period, costs)
    found = (Clock(ranks, Fabric(topology, period), costs).timeline() for ranks in variants)
    slowest = max(found, key=lambda timeline: timeline.seconds)
    return replace(slowest, computing=costs.rate(plan.shape.dtype) is not None, sampled=period < plan.world)


def _variants(plan: Plan, period: int, costs: Costs) -> list[tuple[Tasks, ...]]:
    """Blocks to simulate: sampled ones that do the same things become one, with the largest size of each."""
    count = plan.world // period
    most = min(count, MOST_BLOCKS, max(2, SAMPLED_STEPS // (plan.world * period)))
    # The ends and their neighbours first: under a causal mask they hold the most and the least.
    chosen = [*dict.fromkeys((count - 1, 1 % count, 0, count // 2, max(0, count - 2), count // 4))][:most]
    alike: dict[object, tuple[Tasks, ...]] = {}
    for first in (period * which for which in chosen):
        ranks = tuple(tasks(plan, first + rank, costs) for rank in range(period))
        form = tuple(_form(one, plan.world) for one in ranks)
        alike[form] = tuple(map(_largest, alike[form], ranks)) if form in alike else ranks
    return list(alike.values())


def _form(one: Tasks, world: int) -> object:
    """What must be equal for two ranks to do the same things at other sizes."""
    moves = tuple(
        tuple((key, tuple((other - one.rank) % world for other, _ in table[key])) for key in sorted(table))
        for table in (one.sends, one.receives)
    )
    return tuple((task.verb, task.key) for task in one.list), moves


def _largest(a: Tasks, b: Tasks) -> Tasks:
    """Rank a's tasks, each as long as the longer of both, its messages as large as the larger."""

    def larger(mine: dict[Key, tuple], theirs: dict[Key, tuple]) -> dict[Key, tuple]:
        return {key: tuple((r, max(x, y)) for (r, x), (_, y) in zip(mine[key], theirs[key])) for key in mine}

    listed = tuple(replace(x, seconds=max(x.seconds, y.seconds)) for x, y in zip(a.list, b.list))
    return Tasks(a.rank, listed, larger(a.sends, b.sends), larger(a.receives, b.receives))

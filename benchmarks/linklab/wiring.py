"""Wirings: which boxes there are, which cables join them, how fast each direction is, which way data takes.

    mesh     r0 === r1, r0 === r2, r1 === r2 ...     one cable for each pair of ranks
    ring     r0 === r1 === r2 === r3 === r0          neighbours only; ranks between forward, the shorter way, upwards on a tie
    switch   r0 === switch === r1                    one cable a rank
    nodes    r0 === node0 === top === node1 === r2   one cable a rank, one uplink a node
    bus      r0 --> in ==> out --> r1                all bytes of all ranks share the one shaped direction

A *link* is one direction of one cable, (box that sends, box that receives). Nothing here touches the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

Link = tuple[str, str]
NAMES = ("mesh", "ring", "switch", "bus", "nodes:COUNTxSIZE")


@dataclass(frozen=True)
class Wiring:
    """Boxes, cables and ways. `mbit` holds both directions of every cable; None where a direction is not shaped."""

    name: str
    world: int
    mbit: dict[Link, float | None]
    ways: dict[tuple[int, int], tuple[str, ...]] = field(repr=False)
    """The boxes that data from one rank to another passes, both ends included."""
    bridges: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()

    @property
    def ranks(self) -> tuple[str, ...]:
        return tuple(box(rank) for rank in range(self.world))

    @property
    def boxes(self) -> tuple[str, ...]:
        return (*self.ranks, *self.bridges, *self.routers)

    @property
    def shaped(self) -> dict[Link, float]:
        """The links that have a rate, in Mbit/s."""
        return {link: mbit for link, mbit in self.mbit.items() if mbit is not None}

    def crosses(self, source: int, destination: int) -> tuple[Link, ...]:
        """The shaped links between two ranks."""
        way = self.ways[source, destination]
        return tuple(link for link in pairwise(way) if self.mbit[link] is not None)

    def neighbours(self, name: str) -> tuple[str, ...]:
        """The boxes that a box has a cable to."""
        return tuple(b for a, b in self.mbit if a == name)


def box(rank: int) -> str:
    """The name of a rank's box."""
    return f"r{rank}"


def wire(name: str, world: int, mbit: float, inter_mbit: float | None = None) -> Wiring:
    """The wiring of a name.

    Args:
        name: "mesh", "ring", "switch", "bus", or "nodes:2x3" for two nodes of three ranks.
        world: ranks; of nodes it must be their product.
        mbit: rate of every link and direction, in Mbit/s; of nodes those inside.
        inter_mbit: rate of a node's uplink; a quarter of `mbit` where not given. Nodes only.

    >>> wire("ring", 4, 40).crosses(0, 3)
    (('r0', 'r3'),)
    """
    kind, _, size = name.partition(":")
    if world < 2 or mbit <= 0 or (inter_mbit is not None and inter_mbit <= 0):
        raise ValueError(f"got {world} ranks, {mbit:g} and {inter_mbit} Mbit/s; give 2 ranks or more and rates above 0")
    if inter_mbit is not None and kind != "nodes":
        raise ValueError(f"inter_mbit is {inter_mbit:g} but {name} has one kind of link; leave it out, or take nodes")
    if kind == "nodes":
        count, per_node = _counts(name, size, world)
        return _nodes(name, count, per_node, mbit, mbit / 4 if inter_mbit is None else inter_mbit)
    makers: dict[str, Callable[[int, float], Wiring]] = {"mesh": _mesh, "ring": _ring, "switch": _switch, "bus": _bus}
    if kind not in makers or size:
        raise ValueError(f"topology is {name!r}; give one of {', '.join(NAMES)}")
    return makers[kind](world, mbit)


def _mesh(world: int, mbit: float) -> Wiring:
    pairs = _pairs(world)
    return Wiring(
        "mesh", world, {(box(i), box(j)): mbit for i, j in pairs}, {(i, j): (box(i), box(j)) for i, j in pairs}
    )


def _ring(world: int, mbit: float) -> Wiring:
    def way(source: int, destination: int) -> tuple[str, ...]:
        ahead = (destination - source) % world
        hops = range(ahead + 1) if 2 * ahead <= world else range(0, ahead - world - 1, -1)
        return tuple(box((source + hop) % world) for hop in hops)

    mbits = {(box(i), box((i + way_) % world)): mbit for i in range(world) for way_ in (1, -1)}
    return Wiring("ring", world, mbits, {pair: way(*pair) for pair in _pairs(world)})


def _switch(world: int, mbit: float) -> Wiring:
    ways = {(i, j): (box(i), "switch", box(j)) for i, j in _pairs(world)}
    return Wiring("switch", world, _both(((box(i), "switch") for i in range(world)), mbit), ways, bridges=("switch",))


def _nodes(name: str, count: int, per_node: int, intra: float, inter: float) -> Wiring:
    world = count * per_node
    node = {rank: f"node{rank // per_node}" for rank in range(world)}
    mbits = _both(((box(i), node[i]) for i in range(world)), intra)
    mbits |= _both(((f"node{n}", "top") for n in range(count)), inter)
    ways = {
        (i, j): (box(i), node[i], box(j)) if node[i] == node[j] else (box(i), node[i], "top", node[j], box(j))
        for i, j in _pairs(world)
    }
    return Wiring(name, world, mbits, ways, bridges=("top", *(f"node{n}" for n in range(count))))


def _bus(world: int, mbit: float) -> Wiring:
    mbits: dict[Link, float | None] = {("in", "out"): mbit, ("out", "in"): None}
    for i in range(world):
        mbits |= {(box(i), "in"): None, ("in", box(i)): None, ("out", box(i)): None, (box(i), "out"): None}
    ways = {(i, j): (box(i), "in", "out", box(j)) for i, j in _pairs(world)}
    return Wiring("bus", world, mbits, ways, routers=("in", "out"))


def _counts(name: str, size: str, world: int) -> tuple[int, int]:
    count, _, per_node = size.partition("x")
    if not (count.isdigit() and per_node.isdigit() and int(count) * int(per_node) == world and int(count) > 1):
        raise ValueError(
            f"topology is {name!r} for {world} ranks; give nodes:COUNTxSIZE with COUNT x SIZE = {world}, 2 nodes or more"
        )
    return int(count), int(per_node)


def _pairs(world: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(world) for j in range(world) if i != j]


def _both(cables: object, mbit: float) -> dict[Link, float | None]:
    return {link: mbit for a, b in cables for link in ((a, b), (b, a))}

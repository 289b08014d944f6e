"""One cell of a grid: a topology with rates, a shape, a mask, a direction; and the plans that are compared in it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import tokenring as tr
from benchmarks.linklab.bounds import bound
from benchmarks.linklab.wiring import Link, Wiring, wire
from tokenring.schedules import BACKWARD, FORWARD

HEAD_DIM = 128
ROWS = 16
"""Keys of a rank. Few rows and many heads: bytes grow with both, compute with the square of the rows."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is compared under equal conditions."""

    topology: str = "mesh"
    world: int = 4
    mbit: float = 40.0
    inter_mbit: float | None = None
    gqa: int = 1
    """Query heads per key head."""
    ratio: float = 1.0
    """Queries per key, Sq / Skv."""
    mask: str = "full"
    direction: str = "forward"
    kv_heads: int = 0
    """0: not sized yet, see `sized`."""

    def __post_init__(self) -> None:
        if self.gqa < 1 or not 0 < self.ratio <= 1 or (ROWS * self.ratio) % 1:
            raise ValueError(
                f"got {self.gqa} query heads per key head and {self.ratio:g} queries per key; "
                f"give 1 head or more, and a ratio of at most 1 that leaves whole rows of {ROWS}"
            )

    @property
    def wiring(self) -> Wiring:
        return wire(self.topology, self.world, self.mbit, self.inter_mbit)

    @property
    def shape(self) -> tr.AttentionShape:
        keys = ROWS * self.world
        return tr.AttentionShape(
            batch=1,
            q_length=int(keys * self.ratio),
            kv_length=keys,
            q_heads=self.kv_heads * self.gqa,
            kv_heads=self.kv_heads,
            head_dim=HEAD_DIM,
            dtype=torch.float32,
        )

    @property
    def title(self) -> str:
        inter = "" if self.inter_mbit is None else f"/{self.inter_mbit:g}"
        return f"{self.topology} {self.mbit:g}{inter} Mbit/s, g={self.gqa}, Sq/Skv={self.ratio:g}, {self.mask}, {self.direction}"

    @property
    def schedules(self) -> list[str]:
        """All that can be measured here: those of fixed name, every shape of mesh and USP; on nodes the hybrids too."""
        shapes = [f"{a}x{self.world // a}" for a in range(2, self.world) if self.world % a == 0]
        names = [*(BACKWARD if self.direction == "backward" else FORWARD), "ulysses"]
        names += [f"{family}:{shape}" for family in ("mesh", "usp") for shape in shapes]
        if self.topology.startswith("nodes:"):
            size = self.topology.partition("x")[2]
            inside = {"ring": ("ring", "tokenring", "gather"), "tokenring": ("tokenring", "gather")}
            names += [f"hybrid:{outer}/{inner}@{size}" for outer, some in inside.items() for inner in some]
        return names

    def plan(self, schedule: str, topology: tr.Topology | None = None) -> tr.Plan:
        """The plan of a schedule; "auto" looks at `topology`."""
        layout = "contiguous" if self.mask == "full" else "zigzag"
        return tr.plan(
            schedule,
            world=self.world,
            shape=self.shape,
            layout=layout,
            kv_layout=layout if self.ratio != 1 else None,
            mask=self.mask,
            direction=self.direction,
            topology=topology,
        )

    def sized(self, schedules: list[str], seconds: float) -> Cell:
        """The same with so many heads that the bound of the fastest schedule is about `seconds` at the nominal rates."""
        small = replace(self, kv_heads=self.world)
        nominal = {link: mbit * 1e6 / 8 for link, mbit in self.wiring.shaped.items()}
        fastest = min(bound(small.plan(name), self.wiring, nominal) for name in schedules)
        return replace(small, kv_heads=self.world * max(1, round(seconds / fastest)))


def model(wiring: Wiring, rates: dict[Link, float]) -> tr.Topology:
    """The library's Topology of a wiring, with the rates that raw sockets reach."""
    kind, _, size = wiring.name.partition(":")
    gbytes = min(rates.values()) / 1e9
    if kind == "nodes":
        count, per_node = map(int, size.split("x"))
        topology = tr.Topology.nodes(count, per_node, intra=gbytes, inter=gbytes, through_ports=True)
    else:
        topology = getattr(tr.Topology, kind)(wiring.world, gbytes)
    names = {
        link.name: rates[real] / 1e9
        for pair in wiring.ways
        for link, real in zip(topology.route(*pair), wiring.crosses(*pair), strict=True)
    }
    return topology.with_rates(names)

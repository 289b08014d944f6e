"""Which links join the ranks: a value that says what a message crosses, how fast, and what it shares.

A topology is a set of *links*, each a named resource with a rate in GB/s (1e9 bytes per second), and a rule that gives the
links a message from one rank to another crosses. Messages that cross a link at the same time share its rate.

    mesh     a link for every ordered pair of ranks                       2>0
    switch   a port out and a port in for every rank                      out 2, in 0
    ring     links to both neighbours; a message goes the shorter way     2>1, 1>0
    bus      one link that all messages share, both directions too        bus
    nodes    a topology inside each node, network ports between nodes     node 0: out 1; up 0, down 1

Links follow from the rule and are not stored, so 1,024 ranks cost nothing. `Topology.probe` measures a topology.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenring.links import routes
from tokenring.links.costs import Costs, check_count, check_rate, check_time
from tokenring.links.flows import finish_times

BYTES_PER_GB = 1e9


class Link(NamedTuple):
    """A resource that messages share; its rate in units of 1e9 bytes per second."""

    name: str
    gbytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A hashable value; make it with `mesh`, `switch`, `ring`, `bus`, `nodes`, `probe` or `load`.

    >>> topology = Topology.nodes(2, 4, intra=450, inter=50)
    >>> [link.name for link in topology.route(1, 6)], topology.rate(1, 2)
    (['up 0', 'down 1'], 450.0)
    """

    kind: str
    """"mesh", "switch", "ring", "bus" or "nodes"."""
    world: int
    """How many ranks."""
    gbytes_per_s: float
    """Rate of a link in one direction; of the bus in both together; for "nodes" of a network port."""
    latency_us: float = 0.0
    """What a message takes beside its bytes; on a ring for every link it crosses; for "nodes" that of one between nodes."""
    flow_gbytes_per_s: float | None = None
    """What one message reaches at most where that is less than its links; for "nodes" that of one between nodes."""
    rates: tuple[tuple[str, float], ...] = ()
    """Links that differ, (name, GB/s) sorted by name; `with_rates` sets them."""
    intra: Topology | None = None
    """For "nodes": the topology of the ranks of one node."""
    nic_per: str = "node"
    """For "nodes": whether a network port out and in belongs to a "node" or to a "rank"."""
    through_ports: bool = False
    """For "nodes": whether what leaves or enters a node also crosses the rank's port of `intra`, then a switch."""
    costs: Costs | None = None
    """What computing costs; None: unknown, only communication can be modelled."""
    note: str = field(default="", compare=False)
    """Where the numbers are from."""

    def __post_init__(self) -> None:
        where = f"Topology.{self.kind}"
        if self.kind not in routes.KINDS:
            raise ValueError(f"a topology's kind is {self.kind!r}; give one of {', '.join(routes.KINDS)}")
        check_count(where, "world", self.world)
        check_rate(where, "gbytes_per_s", self.gbytes_per_s)
        check_time(where, "latency_us", self.latency_us)
        if self.flow_gbytes_per_s is not None:
            check_rate(where, "flow_gbytes_per_s", self.flow_gbytes_per_s, "GB/s above 0, or None")
        if self.costs is not None and not isinstance(self.costs, Costs):
            raise ValueError(f"{where} got costs={self.costs!r}; give a tokenring.links.costs.Costs or None")
        for name in ("gbytes_per_s", "latency_us"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not isinstance(self.note, str):
            raise ValueError(f"{where} got note={self.note!r}; give text")
        routes.check(self)

    # -- making one --------------------------------------------------------------------------------------------------

    @classmethod
    def mesh(cls, world: int, gbytes_per_s: float, latency_us: float = 0.0, **options: Any) -> Topology:
        """A link of its own for every ordered pair of ranks.

        Args:
            world: how many ranks.
            gbytes_per_s: rate of a link in one direction, in 1e9 bytes per second.
            latency_us: microseconds a message takes beside its bytes.
            options: the fields `flow_gbytes_per_s`, `costs`, `note`.

        >>> Topology.mesh(4, 50).route(2, 0)
        (Link(name='2>0', gbytes_per_s=50.0),)
        """
        return cls(kind="mesh", world=world, gbytes_per_s=gbytes_per_s, latency_us=latency_us, **options)

    @classmethod
    def switch(cls, world: int, gbytes_per_s: float, latency_us: float = 0.0, **options: Any) -> Topology:
        """A port out and a port in for every rank, full duplex; arguments as in `mesh`.

        >>> [link.name for link in Topology.switch(4, 450).route(2, 0)]
        ['out 2', 'in 0']
        """
        return cls(kind="switch", world=world, gbytes_per_s=gbytes_per_s, latency_us=latency_us, **options)

    @classmethod
    def ring(cls, world: int, gbytes_per_s: float, latency_us: float = 0.0, **options: Any) -> Topology:
        """Links to the two neighbours; a farther message crosses several, the shorter way, upwards on a tie. As in `mesh`.

        >>> [link.name for link in Topology.ring(4, 50).route(3, 1)]
        ['3>0', '0>1']
        """
        return cls(kind="ring", world=world, gbytes_per_s=gbytes_per_s, latency_us=latency_us, **options)

    @classmethod
    def bus(cls, world: int, gbytes_per_s: float, latency_us: float = 0.0, **options: Any) -> Topology:
        """One link for all messages of all ranks in both directions; arguments as in `mesh`.

        >>> Topology.bus(4, 10).seconds([(0, 1, 1e9), (1, 0, 1e9)])
        0.2
        """
        return cls(kind="bus", world=world, gbytes_per_s=gbytes_per_s, latency_us=latency_us, **options)

    @classmethod
    def nodes(
        cls,
        count: int,
        per_node: int,
        *,
        intra: Topology | float,
        inter: float,
        latency_us: float = 0.0,
        **options: Any,
    ) -> Topology:
        """Nodes of equal size: rank r is on node r // per_node.

        Args:
            count, per_node: how many nodes, and ranks on each.
            intra: the topology of the ranks of one node; a number is the rate of a switch's ports in GB/s.
            inter: rate of one network port in one direction, in GB/s.
            latency_us: of a message between nodes; inside a node that of `intra` counts.
            options: `nic_per="rank"` where every rank has a network port of its own (otherwise one out and one in for a
                node); `through_ports=True` where messages between nodes also cross the port of `intra`; those of `mesh`.
        """
        check_count("Topology.nodes", "count", count)
        check_count("Topology.nodes", "per_node", per_node)
        if not isinstance(intra, Topology):
            check_rate("Topology.nodes", "intra", intra, "GB/s of a switch's ports, above 0, or a Topology")
            intra = cls.switch(per_node, intra)
        if intra.world != per_node:
            raise ValueError(
                f"Topology.nodes got per_node={per_node} and an intra of {intra.world} ranks; give one number"
            )
        check_rate("Topology.nodes", "inter", inter)
        options.setdefault("costs", intra.costs)
        inside, world = replace(intra, costs=None, note=""), count * per_node
        return cls(kind="nodes", world=world, gbytes_per_s=inter, latency_us=latency_us, intra=inside, **options)

    @classmethod
    def probe(
        cls, group: Any, *, seconds: float = 2.0, timeout_seconds: float = 60.0, compute: bool = True
    ) -> Topology:
        """Measure the links of a group and what computing costs on its ranks. Collective; one value on every rank.

        See `tokenring.probing.probe.probe`.
        """
        from tokenring.probing.probe import probe

        return probe(group, seconds=seconds, timeout_seconds=timeout_seconds, compute=compute)

    @classmethod
    def load(cls, path: str | Path) -> Topology:
        """A topology that `save` wrote; ValueError names what is wrong with a file."""
        from tokenring.links.topology_file import load

        return load(path)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, for `load`."""
        from tokenring.links.topology_file import save

        save(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` reads them."""
        from tokenring.links.topology_file import to_dict

        return to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Topology:
        """What `to_dict` gave; ValueError names the key that is wrong."""
        from tokenring.links.topology_file import from_dict

        return from_dict(values)

    def with_rates(self, rates: Mapping[str, float]) -> Topology:
        """The same with other rates for some links, by name.

        >>> Topology.mesh(3, 50).with_rates({"0>1": 5.0}).rate(0, 1)
        5.0
        """
        return replace(self, rates=tuple(sorted((dict(self.rates) | dict(rates)).items())))

    # -- reading one -------------------------------------------------------------------------------------------------

    def route(self, source: int, destination: int) -> tuple[Link, ...]:
        """The links that a message crosses, in order."""
        for name, rank in (("source", source), ("destination", destination)):
            if not 0 <= rank < self.world:
                raise ValueError(f"{name} is {rank}; this topology has ranks 0 to {self.world - 1}")
        if source == destination:
            raise ValueError(f"source and destination are both {source}; a message goes to another rank")
        return tuple(self._link(name) for name in routes.crossed(self, source, destination))

    def links(self) -> Iterator[Link]:
        """All links, one after the other: a mesh of 1,024 ranks has a million."""
        return (self._link(name) for name in routes.every(self))

    def rate(self, source: int, destination: int) -> float:
        """GB/s of one message alone."""
        return min(self.flow_limit(source, destination), *(x.gbytes_per_s for x in self.route(source, destination)))

    def flow_limit(self, source: int, destination: int) -> float:
        """GB/s that one message cannot exceed, however free its links are; infinite where only links limit it."""
        limit = self._level(source, destination).flow_gbytes_per_s
        return math.inf if limit is None else limit

    def latency_seconds(self, source: int, destination: int) -> float:
        """Seconds a message takes beside its bytes."""
        level = self._level(source, destination)
        hops = len(self.route(source, destination)) if level.kind == "ring" else 1
        return hops * level.latency_us * 1e-6

    def node(self, rank: int) -> int:
        """The node of a rank; 0 where there is one node."""
        return 0 if self.intra is None else rank // self.intra.world

    def arrivals(self, messages: Iterable[tuple[int, int, float]]) -> list[float]:
        """Seconds until each of some messages (source, destination, bytes) that start together has arrived.

        Links are shared max-min fairly (`tokenring.links.flows`).

        >>> Topology.switch(4, 1).arrivals([(0, 1, 1e9), (0, 2, 2e9)])
        [2.0, 3.0]
        """
        asked = list(messages)
        paths = [self.route(source, destination) for source, destination, _ in asked]
        capacity = {link: link.gbytes_per_s * BYTES_PER_GB for path in paths for link in path}
        limits = [self.flow_limit(source, destination) * BYTES_PER_GB for source, destination, _ in asked]
        ends = finish_times(paths, capacity, limits, [size for _, _, size in asked])
        return [end + self.latency_seconds(source, destination) for end, (source, destination, _) in zip(ends, asked)]

    def seconds(self, messages: Iterable[tuple[int, int, float]]) -> float:
        """Seconds until the last of some messages that start together has arrived; see `arrivals`."""
        return max(self.arrivals(messages), default=0.0)

    def describe(self) -> str:
        """A table of the links, their rates, and what computing costs."""
        from tokenring.links.topology_file import describe

        return describe(self)

    def _level(self, source: int, destination: int) -> Topology:
        """Where latency and flow limit of a message stand: this topology, or that inside a node."""
        inside = self.intra is not None and self.node(source) == self.node(destination)
        return self.intra if inside else self

    def _link(self, name: str) -> Link:
        own = self._own_rates.get(name)
        if own is None:
            inner = name.partition(": ")[2]
            own = self.intra._link(inner).gbytes_per_s if self.intra is not None and inner else self.gbytes_per_s
        return Link(name, own)

    @cached_property
    def _own_rates(self) -> dict[str, float]:
        return dict(self.rates)

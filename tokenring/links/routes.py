"""Names of links: for each kind of topology, what a message crosses and which links there are. Rules, no tables.

mesh     0>1                      switch   out 0, in 1
ring     0>1, 1>2                 bus      bus
nodes    node 0: and a name of the inner kind; up 0, down 1 (of a node) or nic out 3, nic in 5 (of a rank)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from tokenring.links.costs import check_rate

if TYPE_CHECKING:
    from tokenring.topology import Topology

Names = tuple[str, ...]


def crossed(topology: Topology, source: int, destination: int) -> Names:
    """The links between two unlike ranks, in order."""
    return _CROSSED[topology.kind](topology, source, destination)


def every(topology: Topology) -> Iterator[str]:
    """All links of a topology."""
    return _EVERY[topology.kind](topology)


def check(topology: Topology) -> None:
    """ValueError unless what belongs to one kind is given to that kind, and every rate of its own to a link there is."""
    _check_nodes(topology) if topology.kind == "nodes" else _check_flat(topology)
    if topology.rates:
        _check_rates(topology)


def _check_flat(topology: Topology) -> None:
    given = {"intra": topology.intra, "nic_per": topology.nic_per, "through_ports": topology.through_ports}
    for name, default in (("intra", None), ("nic_per", "node"), ("through_ports", False)):
        if given[name] != default:
            raise ValueError(f"Topology.{topology.kind} got {name}={given[name]!r}; only Topology.nodes has it")


def _check_nodes(topology: Topology) -> None:
    inner = topology.intra
    if topology.nic_per not in ("node", "rank"):
        raise ValueError(f'Topology.nodes got nic_per={topology.nic_per!r}; give "node" or "rank"')
    if not isinstance(topology.through_ports, bool):
        raise ValueError(f"Topology.nodes got through_ports={topology.through_ports!r}; give True or False")
    if not isinstance(inner, type(topology)) or topology.world % inner.world:
        raise ValueError(
            f"Topology.nodes of {topology.world} ranks got intra={inner!r}; give a Topology of the ranks of one node"
        )
    if inner.kind == "nodes" or inner.costs is not None:
        raise ValueError("Topology.nodes got an intra of kind nodes or with costs; give a flat one, and costs= outside")
    if topology.through_ports and inner.kind != "switch":
        raise ValueError(f"Topology.nodes got through_ports=True and a {inner.kind} inside; only a switch has ports")


def _check_rates(topology: Topology) -> None:
    unknown = {name for name, _ in topology.rates} - set(every(topology))
    if unknown:
        some = ", ".join(islice(every(topology), 4)) or "none"
        raise ValueError(
            f"no link is named {min(unknown)!r}; a {topology.kind} of {topology.world} ranks has links {some}, ..."
        )
    for name, value in topology.rates:
        check_rate("Topology.with_rates", f"rate of {name!r}", value)


def _mesh(topology: Topology, source: int, destination: int) -> Names:
    return (f"{source}>{destination}",)


def _every_mesh(topology: Topology) -> Iterator[str]:
    ranks = range(topology.world)
    return (f"{s}>{d}" for s in ranks for d in ranks if s != d)


def _switch(topology: Topology, source: int, destination: int) -> Names:
    return f"out {source}", f"in {destination}"


def _every_switch(topology: Topology) -> Iterator[str]:
    if topology.world > 1:
        for rank in range(topology.world):
            yield from (f"out {rank}", f"in {rank}")


def _ring(topology: Topology, source: int, destination: int) -> Names:
    world = topology.world
    ahead = (destination - source) % world
    way, hops = (1, ahead) if 2 * ahead <= world else (-1, world - ahead)
    stops = [(source + way * hop) % world for hop in range(hops + 1)]
    return tuple(f"{a}>{b}" for a, b in pairwise(stops))


def _every_ring(topology: Topology) -> Iterator[str]:
    for rank in range(topology.world):
        for neighbour in sorted({(rank + way) % topology.world for way in (1, -1)} - {rank}):
            yield f"{rank}>{neighbour}"


def _bus(topology: Topology, source: int, destination: int) -> Names:
    return ("bus",)


def _every_bus(topology: Topology) -> Iterator[str]:
    if topology.world > 1:
        yield "bus"


def _nodes(topology: Topology, source: int, destination: int) -> Names:
    inner = topology.intra
    (home, here), (away, there) = divmod(source, inner.world), divmod(destination, inner.world)
    if home == away:
        return tuple(f"node {home}: {name}" for name in crossed(inner, here, there))
    ports = (
        (f"up {home}", f"down {away}") if topology.nic_per == "node" else (f"nic out {source}", f"nic in {destination}")
    )
    return (f"node {home}: out {here}", *ports, f"node {away}: in {there}") if topology.through_ports else ports


def _every_nodes(topology: Topology) -> Iterator[str]:
    inner = topology.intra
    for node in range(topology.world // inner.world):
        yield from (f"node {node}: {name}" for name in every(inner))
        if topology.nic_per == "node":
            yield from (f"up {node}", f"down {node}")
        else:
            for rank in range(node * inner.world, (node + 1) * inner.world):
                yield from (f"nic out {rank}", f"nic in {rank}")


_CROSSED = {"mesh": _mesh, "switch": _switch, "ring": _ring, "bus": _bus, "nodes": _nodes}
_EVERY = {
    "mesh": _every_mesh,
    "switch": _every_switch,
    "ring": _every_ring,
    "bus": _every_bus,
    "nodes": _every_nodes,
}

KINDS = tuple(_CROSSED)

"""The links of a topology as a simulation needs them: numbered, with the rates of what moves on them right now.

Large worlds are *folded*: where rank r + period does what rank r does, one block of `period` ranks stands for all. Links that
the shift maps onto each other become one, which carries, of every message of the block, as many copies as all blocks together
put on each of them:

    mesh 4>7 at period 1     one link a distance, each with one message        out 3     one port, with one message
    ring, 3 links upwards    one link upwards, with three messages             bus       one bus, with a message of every rank
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tokenring.links.flows import share
from tokenring.topology import BYTES_PER_GB, Topology


@dataclass(slots=True, eq=False)
class Flow:
    """A message under way: bytes left at the time `since`, at `rate` bytes per second."""

    path: tuple[int, ...]
    limit: float
    left: float
    rate: float = 0.0
    since: float = 0.0
    version: int = 0
    """Counts changes of the rate; an end that was foreseen before one no longer holds."""
    message: object = None
    """Whose bytes these are."""


class Fabric:
    """Links of a topology, folded to `period` ranks (the world: not folded), and the flows on them."""

    def __init__(self, topology: Topology, period: int) -> None:
        self.topology, self.period, self.world = topology, period, topology.world
        self.names: list[str] = []
        self.capacity: list[float] = []
        self.flows: list[dict[Flow, None]] = []
        """Flows on each link; a dict, because sets have no fixed order."""
        self.bytes: list[float] = []
        self.busy: list[float] = []
        self.busy_since: list[float] = []
        self._numbers: dict[str, int] = {}
        self._paths: dict[tuple[int, int], tuple[tuple[int, ...], float, float]] = {}
        self._slowest: dict[str, float] = {}
        for name, rate in topology.rates:
            key = self._folded(name)
            self._slowest[key] = min(rate, self._slowest.get(key, rate))

    def path(self, source: int, destination: int) -> tuple[tuple[int, ...], float, float]:
        """Links of a message, its own limit in bytes per second, its latency in seconds."""
        pair = source % self.period, (destination - source) % self.world
        found = self._paths.get(pair)
        if found is None:
            numbers = tuple(
                self._number(link.name, link.gbytes_per_s) for link in self.topology.route(source, destination)
            )
            limit = self.topology.flow_limit(source, destination) * BYTES_PER_GB
            found = self._paths[pair] = numbers, limit, self.topology.latency_seconds(source, destination)
        return found

    def start(self, flow: Flow, now: float) -> None:
        """Put a flow on its links; `reshare` gives it a rate."""
        flow.since = now
        for link in flow.path:
            if not self.flows[link]:
                self.busy_since[link] = now
            self.flows[link][flow] = None
            self.bytes[link] += flow.left

    def stop(self, flow: Flow, now: float) -> None:
        """Take a flow off its links."""
        for link in flow.path:
            if flow in self.flows[link]:
                del self.flows[link][flow]
                if not self.flows[link]:
                    self.busy[link] += now - self.busy_since[link]

    def reshare(self, links: Iterable[int], now: float) -> list[Flow]:
        """Rates of all flows that share links with those on some links, however indirectly; flows whose rate changed."""
        touched: dict[Flow, None] = {}
        seen, todo = set(links), list(links)
        while todo:
            for flow in self.flows[todo.pop()]:
                if flow not in touched:
                    touched[flow] = None
                    fresh = [link for link in flow.path if link not in seen]
                    seen.update(fresh)
                    todo += fresh
        flows = list(touched)
        changed = []
        rates = share([flow.path for flow in flows], self.capacity, [flow.limit for flow in flows])
        for flow, rate in zip(flows, rates):
            if rate != flow.rate:
                flow.left -= flow.rate * (now - flow.since)
                flow.since, flow.rate = now, rate
                flow.version += 1
                changed.append(flow)
        return changed

    def _number(self, name: str, gbytes_per_s: float) -> int:
        key = self._folded(name)
        if key not in self._numbers:
            self._numbers[key] = len(self.names)
            self.names.append(name)
            copies = self.world // self.period if name == "bus" else 1
            # A link that is slower than its kind makes all wait that do the same, so it counts for all it is folded with.
            rate = min(gbytes_per_s, self._slowest.get(key, gbytes_per_s)) if self.period < self.world else gbytes_per_s
            self.capacity.append(rate * BYTES_PER_GB / copies)
            self.flows.append({})
            for table in (self.bytes, self.busy, self.busy_since):
                table.append(0.0)
        return self._numbers[key]

    def _folded(self, name: str) -> str:
        """What is the same for all links that a shift by `period` ranks maps onto each other."""
        if self.period == self.world:
            return name
        if self.topology.kind == "nodes":
            node = re.sub(r"^(node|up|down) \d+", r"\1", name)
            return re.sub(r"^(nic \w+) (\d+)", lambda m: f"{m[1]} {int(m[2]) % self.period}", node)
        if ">" in name:
            source, destination = map(int, name.split(">"))
            return f"{source % self.period}+{(destination - source) % self.world}"
        return re.sub(r"\d+", lambda m: str(int(m[0]) % self.period), name)


def block(topology: Topology) -> int:
    """Ranks of the smallest block that a shift of the topology maps onto the next: a node, or one rank."""
    return topology.intra.world if topology.intra else 1

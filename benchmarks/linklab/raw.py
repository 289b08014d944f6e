"""What plain sockets reach in the lab: the honest denominator of every bound. No torch.distributed, no plan.

`link_rates` measures each shaped link with flows that share nothing; `patterns` sets the three ways of using duplex links
(one way round, both ways, all peers) beside gloo, with receives posted first and with sends posted first.
"""

from __future__ import annotations

import socket
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from benchmarks.linklab.crew import Crew
from benchmarks.linklab.jobs import Span, seconds, turns
from benchmarks.linklab.wiring import Link, Wiring

PORT = 29_500
CHUNK = 1 << 18
BYTES_PER_MBIT = 1e6 / 8

Flow = tuple[int, int, int]
"""Source, destination, bytes."""


@dataclass(frozen=True)
class PatternTime:
    """One pattern: what its busiest link must take at the raw rates, and what was measured, in seconds."""

    pattern: str
    bound: float
    sockets: float
    gloo_receives_first: float
    gloo_sends_first: float


def link_rates(crew: Crew, repeat: int = 3, span_seconds: float = 0.5) -> dict[Link, float]:
    """Payload bytes per second of every shaped link: its nominal rate times the share of it that sockets reach.

    In one round of flows no two share a cable or an end, so nothing but acknowledgements comes back on a link. The share is
    that of the fastest run, and of these the median over the links of one nominal rate; links that no single flow can fill
    (an uplink faster than what is behind it) get that of the others.
    """
    wiring = crew.lab.wiring
    rounds = disjoint_rounds(wiring)
    flows = [[(s, d, _size(wiring, s, d, span_seconds)) for s, d in pairs] for pairs in rounds]
    addresses = [crew.lab.address(rank) for rank in range(wiring.world)]
    answers = crew.run(over_sockets, addresses, flows, repeat)
    shares: dict[float, list[float]] = {}
    for index, some in enumerate(flows):
        for source, destination, size in some:
            spans = answers[destination][index]
            mbit = min(wiring.shaped[link] for link in wiring.crosses(source, destination))
            rate = size / min(end - start for start, end in spans)
            shares.setdefault(mbit, []).append(rate / (mbit * BYTES_PER_MBIT))
    common = statistics.median(share for some in shares.values() for share in some)
    return {
        link: mbit * BYTES_PER_MBIT * statistics.median(shares.get(mbit, [common]))
        for link, mbit in wiring.shaped.items()
    }


def patterns(crew: Crew, rates: dict[Link, float], repeat: int = 3, span_seconds: float = 0.2) -> list[PatternTime]:
    """The three patterns; one message of a size takes `span_seconds` on a link of its own."""
    wiring = crew.lab.wiring
    world, size = wiring.world, int(min(rates.values()) * span_seconds) // 4 * 4
    ways = {
        "one way round the ring": [1],
        "both ways at once": [1, world - 1],
        "to all peers at once": list(range(1, world)),
    }
    flows = [
        [(r, (r + way) % world, size) for r in range(world) for way in dict.fromkeys(some)] for some in ways.values()
    ]
    addresses = [crew.lab.address(rank) for rank in range(world)]
    answers = [crew.run(over_sockets, addresses, flows, repeat)]
    answers += [crew.run(over_gloo, flows, repeat, first) for first in (True, False)]
    medians = [
        [statistics.median(seconds([spans[i] for spans in each])) for each in answers] for i in range(len(flows))
    ]
    return [PatternTime(name, floor(wiring, rates, some), *found) for name, some, found in zip(ways, flows, medians)]


def floor(wiring: Wiring, rates: dict[Link, float], flows: list[Flow]) -> float:
    """Seconds that the busiest link needs for some flows."""
    load = dict.fromkeys(rates, 0.0)
    for source, destination, size in flows:
        for link in wiring.crosses(source, destination):
            load[link] += size / rates[link]
    return max(load.values())


def over_sockets(
    rank: int, world: int, addresses: list[str], rounds: list[list[Flow]], repeat: int
) -> list[list[Span]]:
    """A crew task: timed rounds of flows; a span ends when all that comes to this rank is here."""
    with _connected(rank, addresses, {(s, d) for flows in rounds for s, d, _ in flows}) as (outgoing, incoming):
        calls = [_Round(rank, flows, outgoing, incoming) for flows in rounds]
        turns(1, calls)
        times = turns(repeat, calls)
        dist.barrier()
        return times


def over_gloo(rank: int, world: int, rounds: list[list[Flow]], repeat: int, receives_first: bool) -> list[list[Span]]:
    """A crew task: the same by gloo's point to point, in one order of posting or the other."""

    def exchange(flows: list[Flow]) -> None:
        receive = [(dist.irecv, torch.empty(size, dtype=torch.uint8), s) for s, d, size in flows if d == rank]
        send = [(dist.isend, torch.ones(size, dtype=torch.uint8), d) for s, d, size in flows if s == rank]
        posts = receive + send if receives_first else send + receive
        works = [post(tensor, peer) for post, tensor, peer in posts]
        for work in works:
            work.wait()

    calls = [lambda flows=flows: exchange(flows) for flows in rounds]
    turns(1, calls)
    return turns(repeat, calls)


class _Round:
    """One rank's part of a round of flows."""

    def __init__(
        self, rank: int, flows: list[Flow], outgoing: dict[int, socket.socket], incoming: dict[int, socket.socket]
    ) -> None:
        self._sends = [(outgoing[d], size) for s, d, size in flows if s == rank]
        self._receives = [(incoming[s], size) for s, d, size in flows if d == rank]
        self._data = memoryview(bytearray(max((size for _, _, size in flows), default=0)))

    def __call__(self) -> None:
        senders = [threading.Thread(target=end.sendall, args=(self._data[:size],)) for end, size in self._sends]
        receivers = [threading.Thread(target=_receive, args=each) for each in self._receives]
        for thread in senders + receivers:
            thread.start()
        for thread in receivers:
            thread.join()


def _receive(end: socket.socket, size: int) -> None:
    room = memoryview(bytearray(CHUNK))
    while size:
        size -= end.recv_into(room, min(CHUNK, size))


@contextmanager
def _connected(
    rank: int, addresses: list[str], pairs: set[tuple[int, int]]
) -> Iterator[tuple[dict[int, socket.socket], dict[int, socket.socket]]]:
    """One connection for each ordered pair that has a flow: this rank's outgoing and incoming ones, by peer."""
    outgoing: dict[int, socket.socket] = {}
    incoming: dict[int, socket.socket] = {}
    try:
        with socket.create_server((addresses[rank], PORT), backlog=len(addresses)) as server:
            dist.barrier()
            for peer in (d for s, d in pairs if s == rank):
                outgoing[peer] = socket.create_connection((addresses[peer], PORT))
                outgoing[peer].sendall(bytes([rank]))
            for _ in [s for s, d in pairs if d == rank]:
                end, _ = server.accept()
                incoming[end.recv(1)[0]] = end
            dist.barrier()
        yield outgoing, incoming
    finally:
        for end in (*outgoing.values(), *incoming.values()):
            end.close()


def disjoint_rounds(wiring: Wiring) -> list[list[tuple[int, int]]]:
    """Pairs that cover every link some flow can fill; in one round no two share a cable, a source or a destination."""
    left = {link for pair in wiring.ways for link in _slowest(wiring, *pair)}
    rounds = []
    while left:
        used: set[object] = set()
        chosen = []
        for source, destination in wiring.ways:
            both_ways = (*wiring.crosses(source, destination), *wiring.crosses(destination, source))
            cables = map(frozenset, both_ways)
            needs = {*cables, ("from", source), ("to", destination)}
            fills = set(_slowest(wiring, source, destination)) & left
            if fills and not needs & used:
                used |= needs
                left -= fills
                chosen.append((source, destination))
        rounds.append(chosen)
    return rounds


def _slowest(wiring: Wiring, source: int, destination: int) -> tuple[Link, ...]:
    links = wiring.crosses(source, destination)
    least = min(wiring.shaped[link] for link in links)
    return tuple(link for link in links if wiring.shaped[link] == least)


def _size(wiring: Wiring, source: int, destination: int, span_seconds: float) -> int:
    mbit = min(wiring.shaped[link] for link in wiring.crosses(source, destination))
    return int(mbit * BYTES_PER_MBIT * span_seconds)

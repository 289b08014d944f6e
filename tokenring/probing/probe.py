"""Measures a topology: sends the patterns of `tokenring.probing.patterns` over a group's own links and fits every kind to the times.

A byte's time is the slope between two sizes, (t(3n) - t(n)) / 2n, so latency and bursts that a shaper lets through at line
rate drop out. n grows until a message takes long enough to time and time grows in step with size. All ranks see the same
agreed times, so they decide alike; rank 0 fits and tells the others.
"""

from __future__ import annotations

import json
import math
import socket
import time
import zlib
from collections import Counter
from dataclasses import replace
from itertools import groupby
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tokenring.links.costs import Costs, check_rate
from tokenring.probing.calibrate import measure_costs, operation_us, synchronize
from tokenring.probing.fit import Messages, Observation, fit
from tokenring.probing.patterns import patterns
from tokenring.topology import Topology
from tokenring.transport import Transport, connect

SMALLEST, LARGEST = 1 << 12, 1 << 27
"""Bytes of a message."""
MOST_BYTES = 1 << 28
"""Bytes a rank receives at once."""
SHORTEST, LONGEST = 0.002, 0.05
"""Seconds the smaller of two sizes should take."""
WIDER = 3
"""The larger of two sizes over the smaller."""
STRAIGHT = 1.25 * WIDER
"""The larger may take this many times as long; more means that a burst went ahead at another rate."""
LEAST_SLOPE = 0.85
LONG_ENOUGH = 4
"""Sizes stop growing at this many times the seconds wanted, straight or not."""
TRIES, REPEATS = 2, 7
"""Times a size is tried while sizes grow, so that a pause of the machine does not pass for a slow link; then at most in all."""
ECHOES = 21
PATIENCE, ENOUGH = 5, 8
"""After this many times the seconds asked for, what is left out are patterns beyond the first so many."""
COMPUTE_SHARE = 0.5
"""Of the time, for what computing costs."""


def probe(group: Any, *, seconds: float = 2.0, timeout_seconds: float = 60.0, compute: bool = True) -> Topology:
    """Measure the links of a group, and what computing costs on its ranks. Collective.

    Args:
        group: as in `attention`; every rank of it makes the call.
        seconds: about how long to measure. Slow links take longer, up to about five times: a byte must take a time that can
            be told from latency and noise.
        timeout_seconds: longest wait for one exchange; TransportError then, and the group cannot be used again.
        compute: also time attention tiles, merging and messages: the topology's `costs`, which a model of time needs.

    Returns:
        The same topology on every rank. One rank alone has no link; its topology is a mesh of 1.

    >>> probe(None, compute=False).world
    1
    """
    check_rate("probe", "seconds", seconds, "seconds above 0")
    check_rate("probe", "timeout_seconds", timeout_seconds, "seconds above 0")
    runtime = connect(group)
    before, runtime.timeout_seconds = runtime.timeout_seconds, timeout_seconds
    try:
        # backward passes are timed too, also for a caller who computes none
        with torch.inference_mode(False), torch.enable_grad():
            return _Probe(runtime, seconds).topology(compute)
    finally:
        runtime.timeout_seconds = before


class _Probe:
    """One measurement on one rank."""

    def __init__(self, runtime: Transport, seconds: float) -> None:
        self.runtime, self.rank, self.world = runtime, runtime.rank, runtime.world
        self.seconds = seconds
        self.slowest = 0.0
        """Seconds per byte of the slowest message so far."""
        self.buffers = [torch.empty(0, dtype=torch.uint8, device=runtime.device) for _ in range(2)]

    def topology(self, compute: bool) -> Topology:
        costs = measure_costs(self.runtime, self.agreed, self.seconds * COMPUTE_SHARE) if compute else None
        if self.world == 1:
            return Topology.mesh(1, 1.0, costs=costs, note="one rank, no link to measure")
        echoes, observations, per_node = self._echoes(), self._observations(), self._per_node()
        own = self._decided(observations, echoes, per_node, costs) if self.rank == 0 else None
        topology = Topology.from_dict(json.loads(self._told(json.dumps(own.to_dict()) if own else "")))
        if costs is None:
            return topology
        costs = replace(topology.costs, operation_us=operation_us(self.runtime, self.agreed, topology))
        return replace(topology, costs=costs)

    def _decided(
        self, observations: list[Observation], echoes: dict[int, float], per_node: int | None, costs: Costs | None
    ) -> Topology:
        found = fit(self.world, observations, per_node)
        topology = found.topology
        posting = 2e-6 * costs.message_us if costs else 0.0
        latency: dict[bool, list[float]] = {False: [], True: []}
        for peer, seconds in echoes.items():
            hops = len(topology.route(0, peer)) if topology.kind == "ring" else 1
            latency[topology.node(peer) == 0].append(1e6 * max(0.0, seconds - posting) / hops)
        if topology.intra is not None and latency[True]:
            topology = replace(topology, intra=replace(topology.intra, latency_us=median(latency[True])))
        note = (
            f"measured on {socket.gethostname()}, {len(observations)} patterns; the model is off by {found.error:.0%}"
        )
        return replace(topology, latency_us=median(latency[False] or latency[True]), costs=costs, note=note)

    # -- links -------------------------------------------------------------------------------------------------------

    def _observations(self) -> list[Observation]:
        todo, seen = patterns(self.world), []
        start = time.perf_counter()
        for messages in todo:
            if len(seen) >= ENOUGH and self.agreed(time.perf_counter() - start) > PATIENCE * self.seconds:
                break
            seen.append(self._observed(messages, self.seconds / len(todo)))
        return seen

    def _observed(self, messages: Messages, share: float) -> Observation:
        """Times of one pattern at sizes n and 2n, as often as its share of the time allows."""
        start = time.perf_counter()
        target = min(LONGEST, max(SHORTEST, share / 24))
        size = SMALLEST if not self.slowest else max(SMALLEST, 1 << int(math.log2(1 + target / 4 / self.slowest)))
        most = min(LARGEST, MOST_BYTES // max(1, *Counter(d for _, d in messages).values()))
        small = self._tries(messages, size)
        while True:
            large = self._tries(messages, WIDER * size)
            quick, quick_large = self.agreed(min(small)), self.agreed(min(large))
            straight = quick >= target and quick_large <= STRAIGHT * quick
            if straight or quick >= LONG_ENOUGH * target or WIDER**2 * size > most:
                break
            size, small = WIDER * size, large
        while len(small) < REPEATS and (len(small) == TRIES or self.agreed(time.perf_counter() - start) < share):
            small.append(self._timed(messages, size))
            large.append(self._timed(messages, WIDER * size))
        slopes = self._gathered(_slope(median(small), median(large)) / size)
        receivers = {d for _, d in messages}
        self.slowest = max(self.slowest, *(slopes[rank] for rank in receivers))
        return Observation(messages, tuple((rank, slopes[rank]) for rank in sorted(receivers)))

    def _tries(self, messages: Messages, size: int) -> list[float]:
        return [self._timed(messages, size) for _ in range(TRIES)]

    def _timed(self, messages: Messages, size: int) -> float:
        """Seconds that this rank takes for its part of a pattern, all ranks starting together."""
        sources = [s for s, d in messages if d == self.rank]
        sends = [(d, self._buffer(0, size)) for s, d in messages if s == self.rank]
        received = self._buffer(1, size * len(sources))
        receives = [(s, received[i * size : (i + 1) * size]) for i, s in enumerate(sources)]
        self.agreed(0.0)
        start = time.perf_counter()
        self.runtime.exchange(sends, receives, control=True)
        synchronize(self.runtime.device)
        return time.perf_counter() - start

    def _buffer(self, which: int, size: int) -> Tensor:
        if self.buffers[which].numel() < size:
            # Written once here: pages that are touched for the first time would be timed with the message.
            self.buffers[which] = torch.ones(size, dtype=torch.uint8, device=self.runtime.device)
        return self.buffers[which][:size]

    def _echoes(self) -> dict[int, float]:
        """On rank 0: seconds of a message of one byte to each of some ranks, half of the way there and back."""
        found = {}
        for peer in sorted({1, self.world // 2, self.world - 1} - {0}):
            self.agreed(0.0)
            if self.rank in (0, peer):
                times = sorted(self._echo(peer if self.rank == 0 else 0) for _ in range(ECHOES))
                found[peer] = times[ECHOES // 4]  # the lower quartile: a busy machine only ever adds
        return found

    def _echo(self, other: int) -> float:
        byte = self._buffer(0, 1)
        there, back = [(other, byte)], [(other, self._buffer(1, 1))]
        start = time.perf_counter()
        for sends, receives in ((there, []), ([], back)) if self.rank == 0 else (([], back), (there, [])):
            self.runtime.exchange(sends, receives, control=True)
        synchronize(self.runtime.device)
        return (time.perf_counter() - start) / 2

    # -- agreement ---------------------------------------------------------------------------------------------------

    def agreed(self, value: float) -> float:
        """The largest of all ranks' values; no rank returns before all have called."""
        own = torch.tensor([value], dtype=torch.float64, device=self.runtime.device)
        distance = 1
        while distance < self.world:
            other = torch.empty_like(own)
            sends, receives = (self.rank + distance) % self.world, (self.rank - distance) % self.world
            self.runtime.exchange([(sends, own)], [(receives, other)], control=True)
            own = torch.maximum(own, other)
            distance *= 2
        return float(own)

    def _gathered(self, value: float) -> list[float]:
        own = torch.tensor([value], dtype=torch.float64, device=self.runtime.device)
        return [float(x) for x in self.runtime.all_gather(own, same_shape=True, control=True)]

    def _per_node(self) -> int | None:
        """Ranks on one machine, where machines hold equal blocks of ranks."""
        names = self._gathered(float(zlib.crc32(socket.gethostname().encode())))
        blocks = [len(list(block)) for _, block in groupby(names)]
        whole = len(blocks) == len(set(names)) and len(set(blocks)) == 1
        return blocks[0] if whole and 1 < blocks[0] < self.world else None

    def _told(self, text: str) -> str:
        """Rank 0's text on every rank."""
        own = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(self.runtime.device)
        size = self.runtime.broadcast(torch.tensor([own.numel()], device=self.runtime.device), 0, control=True)
        told = own if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8, device=self.runtime.device)
        return bytes(self.runtime.broadcast(told, 0, control=True).tolist()).decode()


def _slope(small: float, large: float) -> float:
    """Seconds for the smaller size without what does not grow with it.

    Both take long beside any latency, so the larger alone says nearly as much: noise in the smaller may not undercut it far.
    """
    return max((large - small) / (WIDER - 1), LEAST_SLOPE * large / WIDER)

"""The least time a plan's transfers need on a wiring, whatever runs it: its own bound.

Each transfer has a *head* (the longest chain of transfers that fills the slot it is taken from) and a *tail* (the longest
chain that needs the slot it fills), every transfer of a chain at the rate of its slowest link. Any set of transfers of one
link takes its bytes over the link's rate, after the least of their heads and before the least of their tails:

    seconds >= min head + sum of bytes / rate + min tail

The bound is the largest of these over all links and sets, and over all whole chains. Computing takes no time here.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

import tokenring as tr
from benchmarks.linklab.wiring import Link, Wiring
from tokenring.plans.step import Transfer

Job = tuple[float, float, float]
"""Head, duration and tail of one transfer on one link, in seconds."""


def bound(plan: tr.Plan, wiring: Wiring, rates: dict[Link, float]) -> float:
    """Seconds below which no executor can go. `rates` in payload bytes per second."""
    walk = _Walk(plan, wiring, rates)
    jobs: dict[Link, list[Job]] = defaultdict(list)
    longest = 0.0
    for transfer in walk.transfers:
        head = walk.full(transfer.source, transfer.source_slot)
        tail = walk.after(transfer.destination, transfer.destination_slot)
        longest = max(longest, head + walk.alone(transfer) + tail)
        for link in wiring.crosses(transfer.source, transfer.destination):
            jobs[link].append((head, plan.transfer_bytes(transfer) / rates[link], tail))
    return max([longest, *map(one_link, jobs.values())])


def one_link(jobs: list[Job]) -> float:
    """The largest min head + sum of durations + min tail over all sets of jobs.

    >>> one_link([(0.0, 2.0, 3.0), (0.0, 1.0, 0.0), (4.0, 1.0, 0.0)])
    5.0
    """
    best = 0.0
    for tail in {job[2] for job in jobs}:
        busy = 0.0
        for head, duration, _ in sorted((job for job in jobs if job[2] >= tail), reverse=True):
            busy += duration
            best = max(best, head + busy + tail)
    return best


class _Walk:
    """What each slot waits for, and what waits for it."""

    def __init__(self, plan: tr.Plan, wiring: Wiring, rates: dict[Link, float]) -> None:
        self.plan, self.wiring, self.rates = plan, wiring, rates
        self.transfers: list[Transfer] = []
        self.comes: dict[tuple[int, str], list[Transfer]] = defaultdict(list)
        self.goes: dict[tuple[int, str], list[Transfer]] = defaultdict(list)
        self.made_of: dict[tuple[int, str], list[str]] = defaultdict(list)
        self.makes: dict[tuple[int, str], list[str]] = defaultdict(list)
        for rank in range(plan.world):
            for step in plan.steps(rank):
                for transfer in (t for lane in step.sends for t in lane):
                    self.transfers.append(transfer)
                    self.comes[transfer.destination, transfer.destination_slot].append(transfer)
                    self.goes[rank, transfer.source_slot].append(transfer)
                for compute in step.computes:
                    self._make(rank, (compute.q, compute.kv), [slot.name for slot in compute.results])
                for total in step.sums:
                    self._make(rank, total.sources, [total.target.name])
                for copy in step.copies:
                    self._make(rank, [copy.source_slot], [copy.destination_slot])
        self.full = lru_cache(maxsize=None)(self._full)
        self.after = lru_cache(maxsize=None)(self._after)

    def alone(self, transfer: Transfer) -> float:
        """Seconds of a transfer that shares its links with nothing."""
        links = self.wiring.crosses(transfer.source, transfer.destination)
        return self.plan.transfer_bytes(transfer) / min(self.rates[link] for link in links)

    def _full(self, rank: int, slot: str) -> float:
        """When a slot can first hold all its rows."""
        arrivals = [self.full(t.source, t.source_slot) + self.alone(t) for t in self.comes[rank, slot]]
        return max(arrivals + [self.full(rank, name) for name in self.made_of[rank, slot]], default=0.0)

    def _after(self, rank: int, slot: str) -> float:
        """How long what needs a slot takes at the least, once it is full."""
        waits = [self.alone(t) + self.after(t.destination, t.destination_slot) for t in self.goes[rank, slot]]
        return max(waits + [self.after(rank, name) for name in self.makes[rank, slot]], default=0.0)

    def _make(self, rank: int, sources: object, targets: list[str]) -> None:
        for target in targets:
            for source in sources:
                self.made_of[rank, target].append(source)
                self.makes[rank, source].append(target)

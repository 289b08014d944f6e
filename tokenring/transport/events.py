"""What a transport counts and times: bytes that leave, and the events of a rank."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class Traffic:
    """Payload bytes that left this rank: `sent[(source, destination)]`; headers and size notes are in `control`."""

    sent: dict[tuple[int, int], int] = field(default_factory=dict)
    control: dict[tuple[int, int], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """One thing a rank did, in seconds of `time.perf_counter()`.

    kind: compute, merge, wait (nothing else could be done), or send (under way: from its posting to the end of the wait for it).
    kernel: the name of the kernel that computed.
    """

    kind: str
    start: float
    stop: float
    step: int = 0
    peer: int = -1
    bytes: int = 0
    kernel: str = ""


@dataclass(eq=False)
class Trace:
    """What `trace(group)` collects."""

    events: list[Event] = field(default_factory=list)


class Ledger:
    """One rank's open counts and traces."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.traffic: list[Traffic] = []
        self.traces: list[Trace] = []
        self._leaving: dict[tuple[int, int], list[tuple[float, int, int]]] = {}

    def left(self, sizes: Sequence[tuple[int, int]], *, control: bool) -> None:
        """(peer, bytes) that were sent."""
        for traffic in self.traffic:
            table = traffic.control if control else traffic.sent
            for peer, size in sizes:
                table[(self.rank, peer)] = table.get((self.rank, peer), 0) + size

    def leaving(self, lane: int, step: int, sizes: Sequence[tuple[int, int]]) -> None:
        """(peer, bytes) of payload that are on their way until the exchange is waited for."""
        if self.traces:
            now = time.perf_counter()
            self._leaving.setdefault((lane, step), []).extend((now, peer, size) for peer, size in sizes)

    def waited(self, lane: int, step: int, start: float) -> None:
        """An exchange has ended, whose wait began at `start`."""
        if self.traces:
            stop = time.perf_counter()
            for pushed, peer, size in self._leaving.pop((lane, step), ()):
                self.record(Event("send", pushed, stop, step, peer, size))
            self.record(Event("wait", start, stop, step))

    def record(self, event: Event) -> None:
        """Add an event to every open trace."""
        for trace in self.traces:
            trace.events.append(event)


@contextmanager
def listening(listeners: list[T], one: T) -> Iterator[T]:
    """`one` is among the listeners inside the block."""
    listeners.append(one)
    try:
        yield one
    finally:
        listeners.remove(one)

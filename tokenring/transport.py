"""Point-to-point transport: lanes of first-in-first-out exchanges between the ranks of one group.

A *lane* is one communicator. On a lane every rank issues its exchanges in the same order; one exchange holds all that a
rank receives and sends in one step, and is driven by three verbs:

    open(lane, step, receives)    receives are posted (early: before the sends they answer, one step ahead where possible)
    push(lane, step, sends)       sends are posted; NCCL gets both halves as one group here
    wait(lane, step)              all of the exchange has arrived and left, or TransportError names rank, step and peer

No tags are relied on: between two ranks, messages of one lane match in the order they were issued. Collectives with
uneven sizes (`all_gather`, `all_to_all`, `broadcast`) are made of the same verbs. Bytes and events are counted here, where
they really leave.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LANES = 3
DEFAULT_TIMEOUT_SECONDS = 300.0

Message = tuple[int, Tensor]


class TransportError(RuntimeError):
    """A transfer failed or timed out. The message names rank, step and peer; the group is poisoned afterwards."""


@dataclass
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


@dataclass
class Trace:
    """What `trace(group)` collects."""

    events: list[Event] = field(default_factory=list)


class Transport:
    """What every transport shares: verbs, counters, and collectives built of the verbs."""

    def __init__(self, rank: int, world: int, timeout_seconds: float) -> None:
        self.rank = rank
        self.world = world
        self.timeout_seconds = timeout_seconds
        self.poison: str | None = None
        self.device = torch.device("cpu")
        """Where the transport's own small messages live."""
        self.calls = 0
        self.prepared: set[Any] = set()
        self._traffic: list[Traffic] = []
        self._traces: list[Trace] = []
        self._leaving: dict[tuple[int, int], list[tuple[float, int, int]]] = {}

    # -- the three verbs -------------------------------------------------------------------------------------------

    def open(self, lane: int, step: int, receives: Sequence[Message]) -> None:
        """Post the receives of one exchange; tensors must be contiguous."""
        self._refuse_if_poisoned()
        self._open(lane, step, receives)

    def push(self, lane: int, step: int, sends: Sequence[Message], *, control: bool = False) -> None:
        """Post the sends of one exchange, counted as payload unless `control`."""
        self._refuse_if_poisoned()
        for peer, tensor in sends:
            size = tensor.numel() * tensor.element_size()
            for traffic in self._traffic:
                table = traffic.control if control else traffic.sent
                table[(self.rank, peer)] = table.get((self.rank, peer), 0) + size
            if self._traces and not control:
                self._leaving.setdefault((lane, step), []).append((time.perf_counter(), peer, size))
        self._push(lane, step, sends)

    def wait(self, lane: int, step: int) -> None:
        """Finish one exchange."""
        start = time.perf_counter()
        try:
            self._wait(lane, step)
        except BaseException as error:
            self.abandon(error)
            raise
        stop = time.perf_counter()
        for pushed, peer, size in self._leaving.pop((lane, step), ()):
            self.record(Event("send", pushed, stop, step, peer, size))
        if self._traces:
            self.record(Event("wait", start, stop, step))

    def _open(self, lane: int, step: int, receives: Sequence[Message]) -> None:
        raise AssertionError("a transport implements _open")

    def _push(self, lane: int, step: int, sends: Sequence[Message]) -> None:
        raise AssertionError("a transport implements _push")

    def _wait(self, lane: int, step: int) -> None:
        raise AssertionError("a transport implements _wait")

    def abandon(self, error: BaseException) -> None:
        """Refuse every later call: a receive may still be posted, and the next call's messages would land in it."""
        if self.world > 1 and self.poison is None:
            self.poison = str(error) if isinstance(error, TransportError) else repr(error)

    def _refuse_if_poisoned(self) -> None:
        if self.poison is not None:
            raise TransportError(
                f"rank {self.rank}: this group failed before and cannot be used again ({self.poison}); make a new group"
            )

    def record(self, event: Event) -> None:
        """Add an event to every open trace."""
        for trace_ in self._traces:
            trace_.events.append(event)

    @property
    def tracing(self) -> bool:
        """Whether anyone wants events."""
        return bool(self._traces)

    # -- collectives with uneven sizes -----------------------------------------------------------------------------

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], *, control: bool = False) -> None:
        """One exchange on lane 0, start to end. Sizes must already be known on both sides."""
        if self.world == 1:
            return
        self.open(0, -1, receives)
        self.push(0, -1, [(peer, tensor.contiguous()) for peer, tensor in sends], control=control)
        self.wait(0, -1)

    def all_gather(self, x: Tensor, *, same_shape: bool = False, control: bool = False) -> list[Tensor]:
        """Every rank's `x` in rank order. Shapes may differ in dim 0 only; `same_shape=True` skips the size round."""
        peers = [p for p in range(self.world) if p != self.rank]
        sizes = [x.shape[0] if x.dim() else 1] * self.world
        if x.dim() and not same_shape and self.world > 1:
            own = torch.tensor([x.shape[0]], dtype=torch.int64, device=x.device)
            notes = {p: torch.empty_like(own) for p in peers}
            self.exchange([(p, own) for p in peers], list(notes.items()), control=True)
            for p, note in notes.items():
                sizes[p] = int(note)
        parts = {p: x.new_empty((sizes[p], *x.shape[1:]) if x.dim() else ()) for p in peers}
        self.exchange([(p, x) for p in peers], list(parts.items()), control=control)
        parts[self.rank] = x
        return [parts[p] for p in range(self.world)]

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """`parts[p]` goes to rank p; returns what each rank sent here. Sizes in dim 0 may differ, and may be 0."""
        if len(parts) != self.world:
            raise ValueError(
                f"all_to_all got {len(parts)} parts for {self.world} ranks; give one part for each rank, empty ones too"
            )
        peers = [p for p in range(self.world) if p != self.rank]
        own = {p: torch.tensor([parts[p].shape[0]], dtype=torch.int64, device=parts[p].device) for p in peers}
        notes = {p: torch.empty_like(own[p]) for p in peers}
        self.exchange(list(own.items()), list(notes.items()), control=True)
        received = {p: parts[p].new_empty((int(notes[p]), *parts[p].shape[1:])) for p in peers}
        self.exchange([(p, parts[p]) for p in peers], list(received.items()))
        received[self.rank] = parts[self.rank]
        return [received[p] for p in range(self.world)]

    def broadcast(self, x: Tensor, source: int, *, control: bool = False) -> Tensor:
        """`x` of rank `source` on every rank; the others give a tensor of the same shape, dtype and device to receive it."""
        if self.rank == source:
            self.exchange([(p, x) for p in range(self.world) if p != source], [], control=control)
        else:
            self.exchange([], [(source, x)], control=control)
        return x


class SingleRank(Transport):
    """World 1: nothing is ever sent."""

    def __init__(self) -> None:
        super().__init__(0, 1, DEFAULT_TIMEOUT_SECONDS)

    def _open(self, lane: int, step: int, receives: Sequence[Message]) -> None:
        assert not receives

    def _push(self, lane: int, step: int, sends: Sequence[Message]) -> None:
        assert not sends

    def _wait(self, lane: int, step: int) -> None:
        return


_runtimes: weakref.WeakKeyDictionary[Any, Transport] = weakref.WeakKeyDictionary()


def connect(group: Any, *, timeout_seconds: float | None = None) -> Transport:
    """The transport of a group; the first call on a group is collective (it makes and warms the lanes).

    Args:
        group: a ProcessGroup, a 1-D DeviceMesh, a LocalGroup (threads in this process), or None for one rank alone.
        timeout_seconds: longest wait for one exchange; kept for the group. 300 s where nobody says.
    """
    if group is None:
        return SingleRank()
    if isinstance(group, Transport):
        return group
    if hasattr(group, "get_group") and hasattr(group, "mesh_dim_names"):
        if group.ndim != 1:
            raise ValueError(f"group is a {group.ndim}-D DeviceMesh; give one axis of it, for instance mesh['cp']")
        group = group.get_group()
    if group not in _runtimes:
        limit = DEFAULT_TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds
        if hasattr(group, "make_transport"):
            _runtimes[group] = group.make_transport(limit)
        elif isinstance(group, dist.ProcessGroup):
            _runtimes[group] = _distributed(group, limit)
        else:
            raise ValueError(
                f"group is a {type(group).__name__}; give a ProcessGroup this rank belongs to, a 1-D DeviceMesh, a LocalGroup or None"
            )
    runtime = _runtimes[group]
    if timeout_seconds is not None:
        runtime.timeout_seconds = timeout_seconds
    return runtime


def _distributed(group: dist.ProcessGroup, timeout_seconds: float) -> Transport:
    from tokenring.distributed import DistributedTransport

    return DistributedTransport(group, timeout_seconds) if group.size() > 1 else SingleRank()


@contextmanager
def count_traffic(group: Any) -> Iterator[Traffic]:
    """Count the payload bytes that leave this rank inside the block.

    >>> with count_traffic(None) as traffic:
    ...     pass
    >>> traffic.sent
    {}
    """
    runtime, traffic = connect(group), Traffic()
    runtime._traffic.append(traffic)
    try:
        yield traffic
    finally:
        runtime._traffic.remove(traffic)


@contextmanager
def trace(group: Any) -> Iterator[Trace]:
    """Collect what this rank does inside the block: compute, send, wait and merge events with times.

    For one rank alone, make the transport once and give it here and to `attention`: `alone = connect(None)`.
    """
    if group is None:
        raise ValueError(
            "trace got no group; for one rank alone give `alone = connect(None)` here and as group= of the calls"
        )
    runtime, record = connect(group), Trace()
    runtime._traces.append(record)
    try:
        yield record
    finally:
        runtime._traces.remove(record)

"""Point-to-point transport: lanes of first-in-first-out exchanges between the ranks of one group.

A *lane* is one communicator. On a lane every rank issues its exchanges in the same order; one exchange holds all that a
rank receives and sends in one step, and is driven by three verbs:

    open(lane, step, receives)    receives are posted (early: before the sends they answer, one step ahead where possible)
    push(lane, step, sends)       sends are posted; NCCL gets both halves as one group here
    wait(lane, step)              all of the exchange has arrived and left, or TransportError names rank, step and peer

No tags are relied on: between two ranks, messages of one lane match in the order they were issued. A lane of its own carries
headers (`announce`): what a rank is about to do, which all ranks judge before anything after it is posted.

A rank that fails tells the others, which stop waiting at once; nothing stays posted, and the group refuses every later call.
Bytes and events are counted here, where they really leave.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenring.collectives import Collectives
from tokenring.events import Event, Ledger, Trace, Traffic

LANES = 3
CONTROL_LANE = LANES
DEFAULT_TIMEOUT_SECONDS = 300.0
HEADER_BYTES = 504

Message = tuple[int, Tensor]
Verdict = Callable[[list[bytes]], None]
"""Sees the headers of all ranks, in rank order; raises ValueError, on every rank alike, where they do not go together."""


class TransportError(RuntimeError):
    """A transfer failed or timed out. The message names rank, step and peer; the group is poisoned afterwards."""


class Transport(Collectives):
    """What every transport shares: verbs, headers, counters, and what happens after an error."""

    def __init__(self, rank: int, world: int, timeout_seconds: float) -> None:
        self.rank = rank
        self.world = world
        self.timeout_seconds = timeout_seconds
        self.poison: str | None = None
        """Why this group cannot be used again."""
        self._raised = False
        """Whether the caller has seen the error that poisoned the group."""
        self.device = torch.device("cpu")
        """Where the transport's own small messages live."""
        self.calls = 0
        self.prepared: dict[Any, None] = {}
        """Plans that need no header, the oldest first."""
        self._poisoning = threading.Lock()
        self._harmless: Callable[[], BaseException | None] = lambda: None
        self._ledger = Ledger(rank)

    # -- the three verbs -------------------------------------------------------------------------------------------

    def open(self, lane: int, step: int, receives: Sequence[Message]) -> None:
        """Post the receives of one exchange; tensors must be contiguous."""
        self._attempt(f"open of step {step}", self._post, partial(self._open, lane, step, receives))

    def push(self, lane: int, step: int, sends: Sequence[Message], *, control: bool = False) -> None:
        """Post the sends of one exchange, counted as payload unless `control`."""
        self._attempt(f"push of step {step}", self._post, partial(self._send, lane, step, sends, control), True)

    def wait(self, lane: int, step: int) -> None:
        """Finish one exchange."""
        start = time.perf_counter()
        self._attempt(f"wait of step {step}", self._wait, lane, step)
        self._ledger.waited(lane, step, start)

    def _post(self, posting: Callable[[], None], urgent: bool = False) -> None:
        """Do it now, or when the headers under way are judged: as soon as they are, if it is urgent or after something is."""
        posting()

    def _send(self, lane: int, step: int, sends: Sequence[Message], control: bool) -> None:
        sizes = [(peer, tensor.numel() * tensor.element_size()) for peer, tensor in sends]
        if not control:
            self._ledger.leaving(lane, step, sizes)
        self._push(lane, step, sends)
        self._ledger.left(sizes, control=control)

    def _open(self, lane: int, step: int, receives: Sequence[Message]) -> None:
        raise AssertionError("a transport implements _open")

    def _push(self, lane: int, step: int, sends: Sequence[Message]) -> None:
        raise AssertionError("a transport implements _push")

    def _wait(self, lane: int, step: int) -> None:
        raise AssertionError("a transport implements _wait")

    # -- headers ---------------------------------------------------------------------------------------------------

    def announce(self, header: bytes, verdict: Verdict) -> None:
        """Send a header to every rank. `verdict` sees those of all ranks before anything of a later verb is posted.

        What it raises is raised here, by a later verb or by `settle`. Nothing was posted then, and the group can go on.
        """
        if len(header) != HEADER_BYTES:
            raise ValueError(f"a header has {HEADER_BYTES} bytes, got {len(header)}")
        self._attempt(f"header of call {self.calls}", self._announce, header, verdict)
        self._ledger.left([(peer, HEADER_BYTES) for peer in range(self.world) if peer != self.rank], control=True)

    def settle(self) -> None:
        """Wait until the headers of the last announcement are judged."""
        self._attempt(f"header of call {self.calls}", self._settle)

    def _announce(self, header: bytes, verdict: Verdict) -> None:
        own = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        others = {peer: torch.empty_like(own) for peer in range(self.world) if peer != self.rank}
        self._open(CONTROL_LANE, 0, list(others.items()))
        self._push(CONTROL_LANE, 0, [(peer, own) for peer in others])
        self._wait(CONTROL_LANE, 0)
        self._judge([header if p == self.rank else others[p].numpy().tobytes() for p in range(self.world)], verdict)

    def _judge(self, headers: list[bytes], verdict: Verdict) -> None:
        try:
            verdict(headers)
        except ValueError as error:
            self._harmless = weakref.ref(error)
            raise

    def _settle(self) -> None:
        return

    # -- errors ----------------------------------------------------------------------------------------------------

    def abandon(self, error: BaseException, *, raised: bool = True) -> None:
        """Tell the other ranks of an error and refuse every later call. They stop waiting; nothing stays posted.

        A verdict on headers is no such error: every rank has raised it, and nothing was posted. raised: whether the caller
        sees this error; if not, the next verb raises it.
        """
        if self.world == 1 or error is self._harmless():
            return
        with self._poisoning:
            self._raised |= raised
            if self.poison is not None:
                return
            self.poison = text = str(error) if isinstance(error, TransportError) else f"{type(error).__name__}: {error}"
        self._give_up(text if text.startswith(f"rank {self.rank} of") else f"rank {self.rank} of {self.world}: {text}")
        self._clear()

    @contextmanager
    def shared_fate(self) -> Iterator[None]:
        """An error inside the block is told to the other ranks, as one of a call is. Around a training step it spares them
        the time-out when this rank runs out of memory.

        >>> with connect(None).shared_fate():
        ...     pass
        """
        try:
            yield
        except BaseException as error:
            self.abandon(error)
            raise

    def _attempt(self, what: str, verb: Callable[..., None], *given: Any) -> None:
        if self.poison is not None:
            self._clear()
            again = (
                f"rank {self.rank}: this group failed before and cannot be used again ({self.poison}); make a new group"
            )
            self._raised, before = True, self._raised
            raise TransportError(again if before else self.poison)
        try:
            if (word := self._word()) is not None:
                raise TransportError(f"rank {self.rank} of {self.world}, {what} not done: {word}")
            verb(*given)
        except BaseException as error:
            self.abandon(error)
            raise

    def _word(self) -> str | None:
        """What a rank that failed has told, where that is known without asking."""
        return None

    def _give_up(self, text: str) -> None:
        """Tell the others, and end every wait; from any thread."""

    def _clear(self) -> None:
        """Let go of what was posted."""

    # -- traces ----------------------------------------------------------------------------------------------------

    def record(self, event: Event) -> None:
        """Add an event to every open trace."""
        self._ledger.record(event)

    @property
    def tracing(self) -> bool:
        """Whether anyone wants events."""
        return bool(self._ledger.traces)


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
    runtime._ledger.traffic.append(traffic)
    try:
        yield traffic
    finally:
        runtime._ledger.traffic.remove(traffic)


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
    runtime._ledger.traces.append(record)
    try:
        yield record
    finally:
        runtime._ledger.traces.remove(record)

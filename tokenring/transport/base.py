"""What every transport shares: the three verbs, headers, counters, and what happens after an error."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from tokenring.transport.collectives import Collectives
from tokenring.transport.events import Event, Ledger
from tokenring.transport.messages import (
    CONTROL_LANE,
    DEFAULT_TIMEOUT_SECONDS,
    HEADER_BYTES,
    Message,
    TransportError,
    Verdict,
)


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

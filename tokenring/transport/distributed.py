"""Ranks as processes: the transport over torch.distributed's back ends (gloo, NCCL).

On gloo a receive is posted when it is opened; NCCL gets the receives and sends of one exchange as one group. Headers always
travel over gloo, so that a check never waits for a GPU. The NCCL branch is written to NCCL's rules, and tested with gloo
behind the same calls; it has run on no GPU yet.

Sizes must be agreed on before payload is posted: gloo ends a process that gets more bytes than its receive holds, and takes
fewer without a word. That is what headers are for.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenring.transport.base import Transport
from tokenring.transport.control import TICK_SECONDS, Attendant, Gate, Headers, LastWords, Pending, close_lane
from tokenring.transport.messages import LANES, Message, TransportError, Verdict

PATIENCE_SECONDS = 0.2
"""How long a rank whose connection was closed looks for the last words of whoever closed it."""
GRACE_SECONDS = 5.0
"""How much longer than its time-out a verdict on headers may take before the attendant itself is given up."""


class DistributedTransport(Transport):
    """torch.distributed, one communicator a lane, made and warmed collectively by every rank of the group.

    The lanes are bare back ends on the group's own store. `new_group` is no way to make them: names of groups that only their
    members make count the groups each rank has made before, so ranks with unlike histories wait for each other for ever.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_seconds: float) -> None:
        super().__init__(group.rank(), group.size(), timeout_seconds)
        self._grouped = "nccl" in str(dist.get_backend(group))
        if self._grouped:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._peers = [peer for peer in range(self.world) if peer != self.rank]
        self._gate: Gate | None = None
        self._lanes: list[Any] = []
        self._headers: Headers | None = None
        self._heard: str | None = None
        self._blocked_since: float | None = None
        self._receives: dict[tuple[int, int], Sequence[Message]] = {}
        self._works: dict[tuple[int, int], list[Pending]] = {}
        self._running: deque[tuple[float, int, int, Any]] = deque()
        """Grouped exchanges, whose wait ends before they do: when they must be done, step, peer, work."""
        self._set_up(group.get_group_store())

    # -- set-up ----------------------------------------------------------------------------------------------------

    def _set_up(self, store: Any) -> None:
        made = store.add(f"tokenring/made/{self.rank}", 1)
        store = dist.PrefixStore(f"tokenring/{made}", store)
        self._last_words = LastWords(store)
        store.set(f"here/{self.rank}", "")
        try:
            self._lanes = [self._make_lane(dist.PrefixStore(str(lane), store)) for lane in range(LANES)]
            self._headers = Headers(self._make_gloo(dist.PrefixStore("headers", store)), self.rank, self.world)
        except RuntimeError as error:
            raise TransportError(
                f"rank {self.rank} of {self.world}, set-up: ranks {self._missing(store)} did not come "
                f"(time-out {self.timeout_seconds:g} s): {_short(error)}"
            ) from error
        self._attendant = Attendant(self)
        for lane in range(LANES):
            notes = [(peer, torch.zeros(1, device=self.device)) for peer in self._peers]
            self.open(lane, -1, notes)
            self.push(lane, -1, [(peer, torch.ones(1, device=self.device)) for peer in self._peers], control=True)
            self.wait(lane, -1)
        self._headers.post()

    def _missing(self, store: Any) -> list[int]:
        with suppress(RuntimeError):  # a store that is gone says nothing
            return [peer for peer in self._peers if not store.check([f"here/{peer}"])]
        return self._peers

    def _make_lane(self, store: Any) -> Any:
        if not self._grouped:
            return self._make_gloo(store)
        options = dist.ProcessGroupNCCL.Options()
        # NCCL's own watchdog ends the process: it must not come before our time-out, which names step and peer
        options._timeout = timedelta(seconds=2 * self.timeout_seconds + 60)
        return dist.ProcessGroupNCCL(store, self.rank, self.world, options)

    def _make_gloo(self, store: Any) -> Any:
        return dist.ProcessGroupGloo(store, self.rank, self.world, timedelta(seconds=self.timeout_seconds))

    # -- verbs -----------------------------------------------------------------------------------------------------

    def _post(self, posting: Callable[[], None], urgent: bool = False) -> None:
        gate = self._gate
        if gate is not None:
            if not gate.handed_over and self._headers.arrived():
                self._settle()
            elif gate.hold(posting):
                if urgent and not gate.handed_over:
                    gate.handed_over = True
                    self._attendant.ask(partial(self._judge_gate, gate))
                return
            else:
                self._settle()
        posting()

    def _open(self, lane: int, step: int, receives: Sequence[Message]) -> None:
        if self._grouped:
            self._receives[(lane, step)] = receives
            return
        backend, works = self._lanes[lane], self._works.setdefault((lane, step), [])
        for peer, tensor in receives:
            work = self._hand_over(f"step {step}", "receive from", peer, backend.recv, tensor)
            works.append(("receive from", peer, work, tensor))

    def _push(self, lane: int, step: int, sends: Sequence[Message]) -> None:
        backend, works = self._lanes[lane], self._works.setdefault((lane, step), [])
        place = f"step {step}"
        if not self._grouped:
            for peer, tensor in sends:
                work = self._hand_over(place, "send to", peer, backend.send, tensor)
                works.append(("send to", peer, work, tensor))
            return
        receives = self._receives.pop((lane, step), ())
        if not receives and not sends:
            return
        backend._start_coalescing()
        for peer, tensor in receives:
            self._hand_over(place, "receive from", peer, backend.recv, tensor)
        for peer, tensor in sends:
            self._hand_over(place, "send to", peer, backend.send, tensor)
        messages = (*receives, *sends)
        tensors = [tensor for _, tensor in messages]
        works.append(("exchange with", messages[0][0], backend._end_coalescing(), tensors))

    def _wait(self, lane: int, step: int) -> None:
        self._settle()
        deadline = time.monotonic() + self.timeout_seconds
        with self._blocked():
            for pending in self._works.pop((lane, step), ()):
                if self._grouped:
                    _, peer, work, _ = pending
                    work.wait()
                    self._running.append((deadline, step, peer, work))
                else:
                    self._finish(f"step {step}", pending, deadline)

    # -- headers ---------------------------------------------------------------------------------------------------

    def _announce(self, header: bytes, verdict: Verdict) -> None:
        self._settle()
        gate = Gate(verdict, f"header of call {self.calls}", time.monotonic() + self.timeout_seconds)
        self._headers.send(header, partial(self._hand_over, gate.place))
        self._gate = gate
        if self._grouped:
            self._settle()  # streams belong to threads; and a GPU has work while its CPU waits

    def _judge_gate(self, gate: Gate) -> None:
        error = None
        try:
            for pending in self._headers.pending:
                self._finish(gate.place, pending, gate.deadline)
            self._judge(self._headers.headers(), gate.verdict)
            gate.release()
        except BaseException as caught:
            error = caught
            self.abandon(error, raised=False)
        if self.poison is None:
            self._headers.post()
        gate.end(error)

    def _settle(self) -> None:
        gate = self._gate
        if gate is None:
            return
        if not gate.handed_over:
            with self._blocked():
                self._judge_gate(gate)
        while not gate.judged.wait(TICK_SECONDS):
            self._heard = self._heard or self._last_words.read()
            if self._heard is not None:
                self._end_waits()
            if time.monotonic() > gate.deadline + GRACE_SECONDS:
                raise self._error(gate.place, "verdict of the attendant")
        self._gate = None
        if gate.error is not None:
            raise gate.error

    @contextmanager
    def _blocked(self) -> Iterator[None]:
        """The attendant looks after whoever waits inside the block."""
        self._blocked_since = time.monotonic()
        try:
            yield
        finally:
            self._blocked_since = None

    # -- errors ----------------------------------------------------------------------------------------------------

    def _hand_over(self, place: str, verb: str, peer: int, post: Callable[..., Any], tensor: Tensor) -> Any:
        try:
            return post([tensor], peer, 0)
        except RuntimeError as error:
            raise self._lost(place, f"{verb} rank {peer}", error, late=False) from error

    def _finish(self, place: str, pending: Pending, deadline: float) -> None:
        verb, peer, work, _ = pending
        left = max(deadline - time.monotonic(), 0.001)  # for gloo 0 is no limit
        try:
            work.wait(timedelta(seconds=left))
        except RuntimeError as error:
            late = time.monotonic() > deadline - 0.002  # gloo counts whole milliseconds
            raise self._lost(place, f"{verb} rank {peer}", error, late) from error

    def _lost(self, place: str, what: str, error: RuntimeError, late: bool) -> TransportError:
        self._heard = self._heard or self._last_words.read(0.0 if late else PATIENCE_SECONDS)
        gone = f"failed: it closed its connection without a word, so it ended or was killed ({_short(error)})"
        return self._error(place, what, None if late else gone)

    def _error(self, place: str, what: str, reason: str | None = None) -> TransportError:
        """What came of an exchange; without a word and a reason it took too long."""
        if self._heard is not None:
            reason = f"failed: {self._heard}"
        elif reason is None:
            reason = f"timed out after {self.timeout_seconds:g} s"
        return TransportError(f"rank {self.rank} of {self.world}, {place}: {what} {reason}")

    def tick(self) -> None:
        """What the attendant does now and then: has another rank failed, while this one waits for a third?"""
        since, running = self._blocked_since, self._running
        while running and running[0][3].is_completed():
            running.popleft()
        if self.poison is None and (running or (since is not None and time.monotonic() - since > TICK_SECONDS)):
            self._heard = self._heard or self._last_words.read()
            if running and (self._heard is not None or time.monotonic() > running[0][0]):
                _, step, peer, _ = running[0]
                self.abandon(self._error(f"step {step}", f"exchange with rank {peer}"), raised=False)
            elif self._heard is not None:
                self._end_waits()

    def _word(self) -> str | None:
        return self._heard

    def _give_up(self, text: str) -> None:
        if self._heard is None:
            self._last_words.leave(text)
        self._end_waits()

    def _end_waits(self) -> None:
        headers = self._headers  # another thread may clear it meanwhile
        for lane in self._lanes:
            if self._grouped:
                with suppress(RuntimeError):
                    lane.abort()
            else:
                close_lane(lane, self._peers)
        if headers is not None:
            close_lane(headers.backend, self._peers)

    def _clear(self) -> None:
        if self._attendant.is_me:
            return  # the thread that calls the verbs may be inside one
        self._attendant.ask(None)
        self._gate, self._lanes, self._headers = None, [], None
        self._works, self._receives, self._running = {}, {}, deque()


def _short(error: BaseException) -> str:
    """Without the place in gloo's sources and the advice after the first sentence."""
    return re.sub(r"^\[\S*\] ", "", str(error).partition("\n")[0]).partition(". ")[0]

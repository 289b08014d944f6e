"""Ranks as threads of one process: the transport that tests and simulations use.

Same verbs, same rule: between two ranks, the messages of a lane match the posted receives first in, first out, whatever the
order of the waits. A send copies its tensor when it is pushed.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tokenring.transport.base import Transport
from tokenring.transport.messages import CONTROL_LANE, Message, TransportError


class LocalWorld:
    """The mailboxes that the ranks of one in-process world share."""

    def __init__(self, world: int) -> None:
        if world < 1:
            raise ValueError(f"an in-process world needs at least 1 rank, got {world}")
        self.world = world
        self.changed = threading.Condition()
        self.mail: dict[tuple[int, int, int], deque[Tensor]] = defaultdict(deque)
        self.word: str | None = None
        """What the first rank that failed said."""

    def groups(self) -> list[LocalGroup]:
        """One handle for each rank, to be passed as `group=`."""
        return [LocalGroup(self, rank) for rank in range(self.world)]

    def tell(self, text: str) -> None:
        """A rank failed: wake every rank that waits."""
        with self.changed:
            self.word = self.word or text
            self.changed.notify_all()


class LocalGroup:
    """One rank's handle on a LocalWorld."""

    def __init__(self, shared: LocalWorld, rank: int) -> None:
        self.shared = shared
        self._rank = rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self.shared.world

    def make_transport(self, timeout_seconds: float) -> Transport:
        return LocalTransport(self.shared, self._rank, timeout_seconds)


class LocalTransport(Transport):
    """Mailboxes instead of a network."""

    def __init__(self, shared: LocalWorld, rank: int, timeout_seconds: float) -> None:
        super().__init__(rank, shared.world, timeout_seconds)
        self._shared = shared
        self._posted: dict[tuple[int, int], deque[tuple[int, Tensor]]] = defaultdict(deque)

    def _open(self, lane: int, step: int, receives: Sequence[Message]) -> None:
        for peer, tensor in receives:
            self._posted[(peer, lane)].append((step, tensor))

    def _push(self, lane: int, step: int, sends: Sequence[Message]) -> None:
        with self._shared.changed:
            for peer, tensor in sends:
                self._shared.mail[(self.rank, peer, lane)].append(tensor.detach().clone())
            self._shared.changed.notify_all()

    def _wait(self, lane: int, step: int) -> None:
        deadline = time.monotonic() + self.timeout_seconds
        for (peer, posted_lane), queue in self._posted.items():
            while posted_lane == lane and any(posted_step == step for posted_step, _ in queue):
                self._fill(peer, lane, *queue.popleft(), deadline)

    def _fill(self, peer: int, lane: int, step: int, tensor: Tensor, deadline: float) -> None:
        place = f"header of call {self.calls}" if lane == CONTROL_LANE else f"step {step}"
        where = f"rank {self.rank} of {self.world}, {place}"
        message = self._take(peer, lane, f"{where}: receive from rank {peer}", deadline)
        if message.shape != tensor.shape or message.dtype != tensor.dtype:
            raise TransportError(
                f"{where}: rank {peer} sent {tuple(message.shape)} {message.dtype}, "
                f"expected {tuple(tensor.shape)} {tensor.dtype}"
            )
        tensor.copy_(message)

    def _take(self, peer: int, lane: int, what: str, deadline: float) -> Tensor:
        box = self._shared.mail[(peer, self.rank, lane)]
        with self._shared.changed:
            while not box:
                if self._shared.word is not None:
                    raise TransportError(f"{what} failed: {self._shared.word}")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TransportError(f"{what} timed out after {self.timeout_seconds:g} s")
                self._shared.changed.wait(left)
            return box.popleft()

    def _word(self) -> str | None:
        return self._shared.word

    def _give_up(self, text: str) -> None:
        self._shared.tell(text)

    def _clear(self) -> None:
        self._posted.clear()


def run_local(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(group, *args)` on every rank of an in-process world; the results in rank order.

    An exception on one rank wakes the others and is raised here.

    >>> from tokenring.transport import connect
    >>> run_local(3, lambda group: connect(group).rank)
    [0, 1, 2]
    """
    shared = LocalWorld(world)
    results: list[Any] = [None] * world
    errors: list[BaseException] = []

    def work(rank: int, group: LocalGroup) -> None:
        try:
            results[rank] = function(group, *args)
        except BaseException as error:
            errors.append(error)
            shared.tell(f"rank {rank} of {world}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(rank, group)) for rank, group in enumerate(shared.groups())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, TransportError)), errors[0])
    return results

"""Beside the payload of a torch.distributed group: headers on a gloo lane of their own, what waits for them, and last words.

    main thread       own header leaves   verbs are held   compute ...             wait
    attendant                                 the others' headers come, are judged; held verbs are posted
                                              (unless all are there before the first push: then the main thread does it)

The receives of the next header are posted before the call it belongs to, so that it travels one way, once.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch

from tokenring.transport.messages import HEADER_BYTES, Verdict

TICK_SECONDS = 0.5
"""How long a rank waits before it looks whether another rank has failed, and between looks."""
STORE_SECONDS = 2.0
"""How long a failing rank gives the store, which may be gone with its host."""
NEVER_SENT = 1
"""A tag that no message has."""

FRAME_BYTES = HEADER_BYTES + 8
Pending = tuple[str, int, Any, Any]
"""What ("receive from"), the peer, the work to wait for, and what it must keep alive."""


class Headers:
    """One rank's end of the header lane: a frame to each rank and one from each, a header and how many came before it."""

    def __init__(self, backend: Any, rank: int, world: int) -> None:
        self.backend, self.rank, self.world = backend, rank, world
        self._number = 0
        self._own = bytearray(FRAME_BYTES)
        self._frames = {peer: bytearray(FRAME_BYTES) for peer in range(world) if peer != rank}
        self._tensors = {peer: torch.frombuffer(f, dtype=torch.uint8) for peer, f in self._frames.items()}
        self._own_tensor = torch.frombuffer(self._own, dtype=torch.uint8)
        self._sends: list[Pending] = []
        self._receives: list[Pending] = []

    def post(self) -> None:
        """Post the receives of the next header. A rank that has ended already is missed when that header is due."""
        self._receives = []
        for peer, tensor in self._tensors.items():
            try:
                work = self.backend.recv([tensor], peer, 0)
            except RuntimeError as error:
                work = Gone(error)
            self._receives.append(("receive from", peer, work, tensor))

    def send(self, header: bytes, post: Callable[..., Any]) -> None:
        """Send the next header to every rank."""
        self._number += 1
        self._own[:] = header + self._number.to_bytes(8, "big")
        own = self._own_tensor
        self._sends = [("send to", p, post("send to", p, self.backend.send, own), own) for p in self._frames]

    @property
    def pending(self) -> list[Pending]:
        """All that one exchange of headers waits for."""
        return [*self._receives, *self._sends]

    def arrived(self) -> bool:
        """Whether waiting would take no time, as far as the frames' last bytes tell."""
        return all(frame[HEADER_BYTES:] == self._own[HEADER_BYTES:] for frame in self._frames.values())

    def headers(self) -> list[bytes]:
        """Those of all ranks, once they are waited for."""
        return [bytes(self._frames.get(p, self._own)[:HEADER_BYTES]) for p in range(self.world)]


class Gone:
    """A receive that could not be posted."""

    def __init__(self, error: RuntimeError) -> None:
        self.error = error

    def wait(self, _: timedelta) -> None:
        raise self.error


class Gate:
    """Verbs of one call, held until its headers are judged, then done in order."""

    def __init__(self, verdict: Verdict, place: str, deadline: float) -> None:
        self.verdict, self.place, self.deadline = verdict, place, deadline
        self.handed_over = False
        """Whether the attendant judges."""
        self.judged = threading.Event()
        self.error: BaseException | None = None
        self._held: list[Callable[[], None]] | None = []
        self._lock = threading.Lock()

    def hold(self, posting: Callable[[], None]) -> bool:
        """Keep a verb for later; False where later is now."""
        with self._lock:
            if self._held is not None:
                self._held.append(posting)
            return self._held is not None

    def release(self) -> None:
        """Do what was held, and what is added meanwhile."""
        while True:
            with self._lock:
                postings, self._held = self._held, []
                if not postings:
                    self._held = None
                    return
            for posting in postings:
                posting()

    def end(self, error: BaseException | None) -> None:
        """The verdict is known: what is still held is dropped."""
        with self._lock:
            self._held, self.error = None, error
        self.judged.set()


class Attendant:
    """One thread beside a transport: it does what it is asked to, and calls `tick` now and then while it has nothing to do.

    It ends when the transport is gone or says so.
    """

    def __init__(self, transport: Any) -> None:
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        target = (self._asked, weakref.ref(transport))
        self._thread = threading.Thread(target=_attend, args=target, name="tokenring attendant", daemon=True)
        self._thread.start()

    def ask(self, job: Callable[[], None] | None) -> None:
        """Do this soon; None: end."""
        self._asked.put(job)

    @property
    def is_me(self) -> bool:
        """Whether it is the attendant that asks."""
        return threading.current_thread() is self._thread


def _attend(asked: queue.SimpleQueue[Callable[[], None] | None], transport: Callable[[], Any]) -> None:
    while True:
        try:
            job = asked.get(timeout=TICK_SECONDS)
        except queue.Empty:
            owner = transport()
            if owner is None:
                return
            job = owner.tick
            del owner
        if job is None:
            return
        job()
        del job


class LastWords:
    """What the first rank that fails leaves in the group's store. Never waits long for a store that is gone with its host."""

    KEY = "failed"

    def __init__(self, store: Any) -> None:
        self._store = store
        self._gone = False

    def leave(self, text: str) -> None:
        """Unless another rank was first."""
        self._bounded(lambda: self._store.compare_set(self.KEY, "", text[:2000]))

    def read(self, patience_seconds: float = 0.0) -> str | None:
        """They are there before a failing rank closes its connections; a store may need a moment all the same."""
        stop = time.monotonic() + patience_seconds
        while (said := self._bounded(self._read)) is None and not self._gone and time.monotonic() < stop:
            time.sleep(0.05)
        return said

    def _read(self) -> str | None:
        return self._store.get(self.KEY).decode() if self._store.check([self.KEY]) else None

    def _bounded(self, call: Callable[[], Any]) -> Any:
        """What a call gives, or None where the store is gone or takes too long; then it is asked no more."""
        answer: list[Any] = []

        def work() -> None:
            with suppress(Exception):
                answer.append(call())

        if not self._gone:
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            thread.join(STORE_SECONDS)
        self._gone = not answer
        return answer[0] if answer else None


def close_lane(backend: Any, peers: Sequence[int]) -> None:
    """Close every connection of a gloo lane, and so end every wait on it, here and on its peers.

    gloo has no other way to do so than a wait that runs out.
    """
    for peer in peers:
        with suppress(RuntimeError):
            backend.recv([torch.empty(1)], peer, NEVER_SENT).wait(timedelta(milliseconds=1))

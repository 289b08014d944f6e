"""The clock of a simulation: ranks go through their tasks, messages through their links, in order of time.

Three things happen: a rank's task ends, the last byte of a message leaves, a message has arrived. All that happens at one
time is done before rates are shared anew, so what a step starts on many ranks at once costs one round.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from tokenring.links.costs import Costs
from tokenring.simulation.fabric import Fabric, Flow
from tokenring.simulation.tasks import Key, Tasks
from tokenring.simulation.timeline import LinkTime, RankTime, Timeline

TOGETHER = 1e-9
"""What lies this share of the time apart happens at once."""


@dataclass(slots=True, eq=False)
class Message:
    """One transfer between two ranks of the block."""

    source: int
    destination: int
    flow: Flow
    latency: float
    queue: deque[Message]
    """Messages between the two ranks on this lane that are not gone, in order."""
    missing: int = 0
    """Of its send and its receive, how many are not posted."""
    moving: bool = False
    gone: bool = False
    arrived: bool = False


@dataclass(slots=True, eq=False)
class Rank:
    """Where one rank is in its program."""

    place: int
    tasks: Tasks
    at: int = 0
    paid: bool = False
    """Whether the seconds of its task are over, and only what it does or waits for is left."""
    waiting: bool = False
    began: float = 0.0
    looked: float = 0.0
    work: float = 0.0
    """Seconds of its task that were left at full speed when last looked at."""
    moving: int = 0
    """Messages from and to it that move."""
    version: int = 0
    """Counts changes of speed; an end that was foreseen before one no longer holds."""
    spent: dict[str, float] = field(default_factory=Counter)


class Clock:
    """The ranks of a block (all ranks, where nothing is folded), and the messages between them."""

    def __init__(self, ranks: Sequence[Tasks], fabric: Fabric, costs: Costs) -> None:
        self.fabric, self.slowdown = fabric, costs.slowdown
        self.ranks = [Rank(place, one) for place, one in enumerate(ranks)]
        self.now = 0.0
        self.heap: list[tuple[float, int, Rank | Message, int]] = []
        self.count = 0
        self.changed: dict[int, None] = {}
        """Links whose messages changed at this time."""
        self.posted: dict[tuple[str, int, Key], list[Message]] = {}
        """Messages that an open or a push of a rank makes readier."""
        self.exchanges: dict[tuple[int, Key], list[Message]] = {}
        """Messages that a wait of a rank is for."""
        self._enlist()

    def timeline(self) -> Timeline:
        """Run to the end."""
        for rank in self.ranks:
            self._proceed(rank)
        self._share()
        while self.heap:
            self.now = self.heap[0][0]
            while self.heap and self.heap[0][0] <= self.now * (1 + TOGETHER):
                _, _, what, version = heappop(self.heap)
                if isinstance(what, Rank):
                    if version == what.version:
                        self._task_over(what)
                elif what.gone:
                    self._arrive(what)
                elif version == what.flow.version:
                    self._leave(what)
            self._share()
        assert all(rank.at == len(rank.tasks.list) for rank in self.ranks), (
            "a rank waits for ever: Plan.check says where"
        )
        spent = ("compute", "merge", "overhead", "wait")
        ranks = tuple(RankTime(rank.tasks.rank, *(rank.spent[kind] for kind in spent)) for rank in self.ranks)
        carried = zip(self.fabric.names, self.fabric.bytes, self.fabric.busy)
        seconds = max(rank.end for rank in ranks)
        return Timeline(seconds, ranks, tuple(LinkTime(*one) for one in carried), computing=True, sampled=False)

    # -- ranks -------------------------------------------------------------------------------------------------------

    def _proceed(self, rank: Rank) -> None:
        """Go on until a task takes time or a wait is not over."""
        while rank.at < len(rank.tasks.list):
            task = rank.tasks.list[rank.at]
            if task.seconds and not rank.paid:
                rank.began, rank.work = self.now, task.seconds
                self._foresee(rank)
                return
            for message in self.posted.get((task.verb, rank.place, task.key), ()):
                message.missing -= 1
                self._start_first(message.queue)
            if task.verb == "wait" and not self._over(rank):
                rank.waiting, rank.began = True, self.now
                return
            rank.at, rank.paid = rank.at + 1, False

    def _task_over(self, rank: Rank) -> None:
        rank.spent[rank.tasks.list[rank.at].kind] += self.now - rank.began
        rank.paid = True
        self._proceed(rank)

    def _foresee(self, rank: Rank) -> None:
        """When the task ends if nothing changes."""
        rank.looked = self.now
        rank.version += 1
        speed = self._speed(rank)
        if speed:
            self._at(self.now + rank.work / speed, rank, rank.version)

    def _speed(self, rank: Rank) -> float:
        slowed = rank.moving and rank.tasks.list[rank.at].kind == "compute"
        return 1 - self.slowdown if slowed else 1.0

    def _move(self, rank: Rank, more: int) -> None:
        """Messages of a rank begin or end to move; a compute it is in changes speed with the first and the last."""
        in_task = not (rank.waiting or rank.paid) and rank.at < len(rank.tasks.list)
        if in_task and self.slowdown and (rank.moving == 0) != (rank.moving + more == 0):
            rank.work -= (self.now - rank.looked) * self._speed(rank)
            rank.moving += more
            self._foresee(rank)
        else:
            rank.moving += more

    def _wake(self, rank: Rank) -> None:
        if rank.waiting and self._over(rank):
            rank.waiting = False
            rank.spent["wait"] += self.now - rank.began
            rank.at, rank.paid = rank.at + 1, False
            self._proceed(rank)

    def _over(self, rank: Rank) -> bool:
        """Whether all that the exchange brings is there, and all that it takes is gone."""
        messages = self.exchanges.get((rank.place, rank.tasks.list[rank.at].key), ())
        return all(m.gone and (m.arrived or m.destination != rank.place) for m in messages)

    # -- messages ----------------------------------------------------------------------------------------------------

    def _start_first(self, queue: deque[Message]) -> None:
        if queue and not queue[0].missing and not queue[0].moving:
            message = queue[0]
            message.moving = True
            self.fabric.start(message.flow, self.now)
            self.changed.update(dict.fromkeys(message.flow.path))
            for place in (message.source, message.destination):
                self._move(self.ranks[place], 1)

    def _leave(self, message: Message) -> None:
        self.fabric.stop(message.flow, self.now)
        self.changed.update(dict.fromkeys(message.flow.path))
        message.gone = True
        message.queue.popleft()
        self._start_first(message.queue)
        for place in (message.source, message.destination):
            self._move(self.ranks[place], -1)
        if message.latency:
            self._at(self.now + message.latency, message, 0)
            self._wake(self.ranks[message.source])
        else:
            self._arrive(message)

    def _arrive(self, message: Message) -> None:
        message.arrived = True
        self._wake(self.ranks[message.destination])
        self._wake(self.ranks[message.source])

    def _share(self) -> None:
        """New rates for what moves on links that changed, and when it will be gone."""
        if self.changed:
            flows = self.fabric.reshare(self.changed, self.now)
            self.changed = {}
            for flow in flows:
                self._at(self.now + max(0.0, flow.left) / flow.rate, flow.message, flow.version)

    def _at(self, when: float, what: Rank | Message, version: int) -> None:
        self.count += 1  # of equal times the first that was foreseen comes first; without it a heap would compare ranks
        heappush(self.heap, (when, self.count, what, version))

    # -- set-up ------------------------------------------------------------------------------------------------------

    def _enlist(self) -> None:
        """All messages: what ranks send, and what they receive from ranks that the block's own do not stand for."""
        period = self.fabric.period
        does = {
            (t.verb, rank.place, t.key) for rank in self.ranks for t in rank.tasks.list if t.verb in ("open", "push")
        }
        queues: dict[tuple[int, int, int], deque[Message]] = {}
        sent: Counter[tuple[Key, int, int]] = Counter()
        for rank in self.ranks:
            for key in sorted(rank.tasks.sends):
                for destination, size in rank.tasks.sends[key]:
                    sent[key, rank.place, destination % period] += 1
                    self._add(rank.tasks.rank, destination, key, size, does, queues)
        for rank in self.ranks:
            for key in sorted(rank.tasks.receives):
                for source, size in rank.tasks.receives[key]:
                    sent[key, source % period, rank.place] -= 1
                    if sent[key, source % period, rank.place] < 0:
                        self._add(source, rank.tasks.rank, key, size, does, queues)

    def _add(self, source: int, destination: int, key: Key, size: int, does: set, queues: dict) -> None:
        here, there = source % self.fabric.period, destination % self.fabric.period
        path, limit, latency = self.fabric.path(source, destination)
        queue = queues.setdefault((here, (destination - source) % self.fabric.world, key[0]), deque())
        message = Message(here, there, Flow(path, limit, size), latency, queue)
        message.flow.message = message
        queue.append(message)
        for post in (("push", here, key), ("open", there, key)):
            if post in does:
                message.missing += 1
                self.posted.setdefault(post, []).append(message)
        for place in {here, there}:
            self.exchanges.setdefault((place, key), []).append(message)

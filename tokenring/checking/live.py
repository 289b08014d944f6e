"""No rank of a plan waits for ever, with every lane a first-in-first-out queue of grouped exchanges (NCCL's condition).

An exchange is *reached* on a rank once it is pushed there and those before it on its lane are done. It is done once it is
reached here and on all its peers. Every push and every end may let others go on, so each is looked at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenring.checking.slots import PlanError
from tokenring.plans.program import operations
from tokenring.plans.step import LANES, Step

Key = tuple[int, int, int]
"""(rank, lane, step) of an exchange."""


def check_live(steps: Sequence[tuple[Step, ...]]) -> None:
    """Play every rank's program, or raise PlanError for the first rank that waits for ever."""
    _Play(steps).play()


class _Play:
    def __init__(self, steps: Sequence[tuple[Step, ...]]) -> None:
        self.programs = [_program(mine) for mine in steps]
        self.at = [0] * len(steps)
        self.queues = {
            (rank, lane): [i for i, step in enumerate(mine) if step.moves(lane)]
            for rank, mine in enumerate(steps)
            for lane in LANES
        }
        self.heads = dict.fromkeys(self.queues, 0)
        self.peers: dict[Key, set[int]] = {}
        for (rank, lane), queue in self.queues.items():
            for i in queue:
                sends, receives = steps[rank][i].sends[lane], steps[rank][i].receives[lane]
                self.peers[(rank, lane, i)] = {t.destination for t in sends} | {t.source for t in receives}
        self.missing = {key: len(peers) for key, peers in self.peers.items()}
        """How many peers of an exchange have not reached it."""
        self.pushed: set[Key] = set()
        self.reached: set[Key] = set()
        self.done: set[Key] = set()

    def play(self) -> None:
        waiting = list(range(len(self.programs)))
        while waiting:
            waiting += self._advance(waiting.pop())
        stuck = [rank for rank, program in enumerate(self.programs) if self.at[rank] < len(program)]
        if stuck:
            _, lane, index = self.programs[stuck[0]][self.at[stuck[0]]]
            raise PlanError(
                f"deadlock: rank {stuck[0]} waits for ever for step {index} on lane {lane} ({len(stuck)} ranks are stuck)"
            )

    def _advance(self, rank: int) -> list[int]:
        """Go on until a wait that cannot end; the ranks that may go on because of it."""
        program, free = self.programs[rank], []
        while self.at[rank] < len(program):
            verb, lane, index = program[self.at[rank]]
            if verb == "push":
                self.pushed.add((rank, lane, index))
                free += self._reach(rank, lane)
            elif (rank, lane, index) not in self.done:
                break
            self.at[rank] += 1
        return free

    def _reach(self, rank: int, lane: int) -> list[int]:
        """The head of a lane may be reached now, end, and let the next one be reached; the ranks where something ended."""
        free, todo = [], [(rank, lane)]
        while todo:
            queue, head = self.queues[todo[-1]], self.heads[todo[-1]]
            here, lane = todo.pop()
            key = (here, lane, queue[head]) if head < len(queue) else None
            if key is None or key in self.reached or key not in self.pushed:
                continue
            self.reached.add(key)
            for peer in self.peers[key]:
                other = (peer, lane, key[2])
                if other in self.missing:
                    self.missing[other] -= 1
            for ended in (key, *((peer, lane, key[2]) for peer in self.peers[key])):
                if self.missing.get(ended) == 0 and ended in self.reached and ended not in self.done:
                    self.done.add(ended)
                    self.heads[ended[:2]] += 1
                    free.append(ended[0])
                    todo.append(ended[:2])
        return free


def _program(steps: tuple[Step, ...]) -> list[tuple[str, int, int]]:
    """The pushes and waits of the executor, in its order."""
    return [(o.verb, o.lane, o.step) for o in operations(steps) if o.verb in ("push", "wait")]

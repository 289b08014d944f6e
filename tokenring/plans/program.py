"""The order in which one rank does what its steps say: one list of operations, which the executor runs, `check` proves free
of deadlock and `simulate` times.

    open lane i      receives are posted: lanes 0 and 2 a step ahead, lane 1 with its own step
    copy             rows of this rank's own go where they are wanted beside others'
    push 0, push 2   what travels ahead leaves
    compute          while it moves
    sum              partials over the same rows become one
    push 1           partials leave
    merge            partials of own rows join the result
    wait lane i      just before the first use of what that exchange brings; exchanges of a lane end in order
    free             after the last use of a slot
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenring.plans.step import AHEAD_LANE, LANES, PAYLOAD_LANE, RETURN_LANE, Step


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing to do. `what`: the Transfer, Compute or Sum, or a slot's name (merge, free)."""

    verb: str
    step: int
    lane: int = 0
    what: Any = None


def operations(steps: tuple[Step, ...]) -> tuple[Operation, ...]:
    """One rank's operations, in order."""
    return _Writer(steps).written()


class _Writer:
    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.steps = steps
        self.list: list[Operation] = []
        self.flying: dict[int, list[int]] = {lane: [] for lane in LANES}
        """Exchanges of each lane that are pushed and not waited for."""
        self.filled_by = {
            t.destination_slot: (lane, index)
            for index, step in enumerate(steps)
            for lane in LANES
            for t in step.receives[lane]
        }

    def written(self) -> tuple[Operation, ...]:
        last = _last_uses(self.steps)
        self._open((PAYLOAD_LANE, AHEAD_LANE), 0)
        for index, step in enumerate(self.steps):
            self._open((PAYLOAD_LANE, AHEAD_LANE), index + 1)
            self._open((RETURN_LANE,), index)
            for copy in step.copies:
                self._use(copy.source_slot)
                self.list.append(Operation("copy", index, what=copy))
            self._push((PAYLOAD_LANE, AHEAD_LANE), index)
            for compute in step.computes:
                self._use(compute.q, compute.kv)
                self.list.append(Operation("compute", index, what=compute))
            for total in step.sums:
                self._use(*total.sources)
                self.list.append(Operation("sum", index, what=total))
            self._push((RETURN_LANE,), index)
            for name in step.merges:
                self._use(name)
                self.list.append(Operation("merge", index, what=name))
            self.list += [Operation("free", index, what=name) for name in last.get(index, ())]
        for lane in LANES:
            self._finish(lane, len(self.steps))
        return tuple(self.list)

    def _open(self, lanes: tuple[int, ...], index: int) -> None:
        if index < len(self.steps):
            moving = (lane for lane in lanes if self.steps[index].receives[lane])
            self.list += [Operation("open", index, lane) for lane in moving]

    def _push(self, lanes: tuple[int, ...], index: int) -> None:
        for lane in lanes:
            if self.steps[index].moves(lane):
                self._use(*(t.source_slot for t in self.steps[index].sends[lane]))
                self.list.append(Operation("push", index, lane))
                self.flying[lane].append(index)

    def _use(self, *names: str) -> None:
        for name in names:
            if name in self.filled_by:
                self._finish(*self.filled_by.pop(name))

    def _finish(self, lane: int, upto: int) -> None:
        flying = self.flying[lane]
        while flying and flying[0] <= upto:
            self.list.append(Operation("wait", flying.pop(0), lane))


def _last_uses(steps: tuple[Step, ...]) -> dict[int, list[str]]:
    """For each step, the slots that no later step reads."""
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        names = [n for c in step.computes for n in (c.q, c.kv)] + [n for s in step.sums for n in s.sources]
        names += [t.source_slot for lane in LANES for t in step.sends[lane]]
        names += [t.source_slot for t in step.copies] + list(step.merges)
        last.update(dict.fromkeys(names, index))
    ends: dict[int, list[str]] = {}
    for name, index in last.items():
        ends.setdefault(index, []).append(name)
    return ends

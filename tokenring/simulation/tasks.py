"""What a rank's program costs it: the operations of `plans/program.py` as tasks with seconds, and the messages that they move.

compute   tile_us a tile + 2 pairs heads (D + Dv) / rate           backward 2 pairs heads (3 D + 2 Dv) / rate
merge     bytes in the accumulator's dtype / merge rate            sums and copies too; a first whole merge is free
open      message_us a tensor that is received                     push: a tensor that is sent
each of them and each wait also operation_us
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tokenring.links.costs import BACKWARD_FACTORS, FORWARD_FACTORS, Costs
from tokenring.plans.plan import Plan
from tokenring.plans.program import Operation
from tokenring.plans.step import LANES, Compute, Slot, Step, Transfer

TENSORS = {"q": 1, "kv": 2, "out": 2, "qd": 4, "dq": 1, "dkv": 2}
"""Tensors that one transfer of a kind is sent as."""

Key = tuple[int, int]
"""(lane, step) of an exchange."""


@dataclass(frozen=True, slots=True)
class Task:
    """One operation: seconds that the rank is busy with it, under the heading `kind`; for open, push and wait of `key`."""

    verb: str
    kind: str
    seconds: float
    key: Key


@dataclass(frozen=True, slots=True)
class Tasks:
    """One rank's tasks in order, and the messages of each exchange: (other rank, bytes)."""

    rank: int
    list: tuple[Task, ...]
    sends: dict[Key, tuple[tuple[int, int], ...]]
    receives: dict[Key, tuple[tuple[int, int], ...]]


def tasks(plan: Plan, rank: int, costs: Costs) -> Tasks:
    """What one rank does, and what that costs where `costs` say so; unknown rates cost nothing."""
    steps = plan.steps(rank)
    writer = _Writer(plan, costs, steps)
    listed = tuple(task for operation in plan.operations(rank) for task in writer.task(operation))
    sends, receives = (
        {
            (lane, index): tuple((getattr(t, other), plan.transfer_bytes(t)) for t in getattr(step, side)[lane])
            for index, step in enumerate(steps)
            for lane in LANES
            if getattr(step, side)[lane]
        }
        for side, other in (("sends", "destination"), ("receives", "source"))
    )
    return Tasks(rank, listed, sends, receives)


class _Writer:
    def __init__(self, plan: Plan, costs: Costs, steps: tuple[Step, ...]) -> None:
        self.plan, self.costs, self.steps, self.shape = plan, costs, steps, plan.shape
        self.rate = costs.rate(plan.shape.dtype)
        self.slots = {slot.name: slot for step in steps for slot in _slots(step)}
        self.merged: set[str] = set()

    def task(self, operation: Operation) -> Iterator[Task]:
        """The task of an operation; none for one that costs nothing."""
        verb, key = operation.verb, (operation.lane, operation.step)
        if verb == "free":
            return
        fixed = 1e-6 * self.costs.operation_us
        if verb == "compute":
            yield Task(verb, "compute", fixed + self._compute(operation.what), key)
        elif verb in ("copy", "sum", "merge"):
            yield Task(verb, "merge", fixed + self._merge(operation), key)
        else:
            side = {"open": "receives", "push": "sends"}.get(verb)
            moved = getattr(self.steps[operation.step], side)[operation.lane] if side else ()
            posted = sum(TENSORS[transfer.what] for transfer in moved)
            yield Task(verb, "overhead", fixed + 1e-6 * self.costs.message_us * posted, key)

    def _compute(self, compute: Compute) -> float:
        if self.rate is None:
            return 0.0
        shape, backward = self.shape, self.plan.problem.backward
        v_dim = shape.head_dim if shape.v_head_dim is None else shape.v_head_dim
        qk, pv = BACKWARD_FACTORS if backward else FORWARD_FACTORS
        pairs = sum(tile.pairs() * (shape.batch if tile.batch is None else 1) for tile in compute.tiles)
        flops = 2 * pairs * self.plan.heads("q", compute.heads) * (qk * shape.head_dim + pv * v_dim)
        speed = self.rate.backward_flops if backward and self.rate.backward_flops else self.rate.forward_flops
        return flops / speed + 1e-6 * self.rate.tile_us * len(compute.tiles)

    def _merge(self, operation: Operation) -> float:
        if self.costs.merge_gbytes_per_s is None:
            return 0.0
        what = operation.what
        if isinstance(what, Transfer):
            size = self.plan.transfer_bytes(what)
        elif isinstance(what, str):
            slot = self.slots[what]
            first = slot.what not in self.merged
            self.merged.add(slot.what)
            size = 0 if first and self._whole(slot) else self._wide_bytes(slot)
        else:
            size = sum(self._wide_bytes(self.slots[name]) for name in what.sources)
        return size / (1e9 * self.costs.merge_gbytes_per_s)

    def _whole(self, slot: Slot) -> bool:
        layout = self.plan.problem.layout(slot.what)
        return slot.heads is None and slot.rows == layout.length(slot.pieces[0].owner)

    def _wide_bytes(self, slot: Slot) -> int:
        """Bytes of a partial in the accumulator's dtype."""
        shape, size = self.shape, 8 if self.shape.dtype == torch.float64 else 4
        v_dim = shape.head_dim if shape.v_head_dim is None else shape.v_head_dim
        width = {"out": v_dim, "dq": shape.head_dim, "dkv": shape.head_dim + v_dim}.get(slot.what, 0)
        return shape.batch * slot.rows * self.plan.heads(slot.what, slot.heads) * width * size


def _slots(step: Step) -> Iterator[Slot]:
    yield from step.slots
    yield from (slot for compute in step.computes for slot in compute.results)
    yield from (total.target for total in step.sums)

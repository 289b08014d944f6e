"""Runs a plan on one rank, forward or backward. It knows steps, slots and lanes, and no schedule by name.

Order in one step: the receives of the next step are posted, then this step's sends; tiles are computed while both move; the
partials made for others leave; what came home in the step before is merged. Receives always precede the sends of their step,
because on a shared connection a receive's ready message would queue behind bulk data.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from tokenring.plan import PAYLOAD_LANE, RETURN_LANE, Compute, Plan, Slot, Step, Transfer
from tokenring.segments import Range
from tokenring.transport import Event, Message, Transport
from tokenring.work import ROW_DIMS, Tensors, Work


def run(plan: Plan, transport: Transport, work: Work) -> Tensors:
    """This rank's part of the plan: `work.result()` when all steps are done."""
    try:
        return _Run(plan, transport, work).result()
    except BaseException as error:
        transport.abandon(error)
        raise


class _Run:
    """One rank's slots, and what is under way."""

    def __init__(self, plan: Plan, transport: Transport, work: Work) -> None:
        self.transport, self.work = transport, work
        self.steps = plan.steps(transport.rank)
        self.slots: dict[str, Slot] = {what: plan.problem.own(what, transport.rank) for what in ("q", "kv")}
        self.held: dict[str, Tensors] = dict(work.inputs)
        self.last_use = _last_uses(self.steps)
        self.landing: dict[tuple[int, int], list[tuple[Tensor, Tensor, int, tuple[Range, ...]]]] = {}

    def result(self) -> Tensors:
        self._open(PAYLOAD_LANE, 0)
        for index, step in enumerate(self.steps):
            self._open(PAYLOAD_LANE, index + 1)
            self._open(RETURN_LANE, index)
            self._push(PAYLOAD_LANE, index, step)
            for compute in step.computes:
                self._compute(compute, index)
            self._push(RETURN_LANE, index, step)
            self._wait(RETURN_LANE, index - 1)
            for name in step.merges:
                self._merge(name, index)
            self._wait(PAYLOAD_LANE, index)
            for name in [n for n in self.held if self.last_use.get(n, -1) <= index and n not in self._arriving(index)]:
                del self.held[name]
        self._wait(RETURN_LANE, len(self.steps) - 1)
        return self.work.result()

    # -- transfers ---------------------------------------------------------------------------------------------------

    def _open(self, lane: int, index: int) -> None:
        if index >= len(self.steps):
            return
        step = self.steps[index]
        for slot in step.slots:
            if any(t.destination_slot == slot.name for t in step.receives[lane]):
                self.slots[slot.name] = slot
                self.held[slot.name] = self.work.allocate(slot)
        messages: list[Message] = []
        for transfer in step.receives[lane]:
            ranges = self.slots[transfer.destination_slot].locate(transfer.pieces)
            for tensor, dim in zip(self.held[transfer.destination_slot], ROW_DIMS[transfer.what]):
                view = _view(tensor, dim, ranges)
                if view is None or not view.is_contiguous():
                    view = tensor.new_empty([transfer.rows if d == dim else n for d, n in enumerate(tensor.shape)])
                    self.landing.setdefault((lane, index), []).append((view, tensor, dim, ranges))
                messages.append((transfer.source, view))
        if messages:
            self.transport.open(lane, index, messages)

    def _push(self, lane: int, index: int, step: Step) -> None:
        if step.sends[lane] or step.receives[lane]:
            self.transport.push(lane, index, [m for transfer in step.sends[lane] for m in self._messages(transfer)])

    def _messages(self, transfer: Transfer) -> list[Message]:
        ranges = self.slots[transfer.source_slot].locate(transfer.pieces)
        rows: list[Tensor] = []
        for tensor, dim in zip(self.held[transfer.source_slot], ROW_DIMS[transfer.what]):
            view = _view(tensor, dim, ranges)
            rows.append(torch.cat([tensor.narrow(dim, a, b - a) for a, b in ranges], dim=dim) if view is None else view)
        return [(transfer.destination, x.contiguous()) for x in self.work.on_wire(transfer.what, tuple(rows))]

    def _wait(self, lane: int, index: int) -> None:
        if index < 0 or not (self.steps[index].sends[lane] or self.steps[index].receives[lane]):
            return
        self.transport.wait(lane, index)
        for buffer, tensor, dim, ranges in self.landing.pop((lane, index), ()):
            row = 0
            for start, stop in ranges:
                tensor.narrow(dim, start, stop - start).copy_(buffer.narrow(dim, row, stop - start))
                row += stop - start

    def _arriving(self, index: int) -> set[str]:
        return {slot.name for step in self.steps[index : index + 2] for slot in step.slots}

    # -- compute and merge -------------------------------------------------------------------------------------------

    def _compute(self, compute: Compute, index: int) -> None:
        start = time.perf_counter()
        sides = (compute.q, compute.kv)
        partials = self.work.compute(*(self.held[side] for side in sides), compute.tiles)
        for slot, side, (first, tensors) in zip(compute.results, sides, partials):
            rows = self.slots[side].locate(slot.pieces)
            self.slots[slot.name] = slot
            self.held[slot.name] = _rows(tensors, ROW_DIMS[slot.what], [(a - first, b - first) for a, b in rows])
        if self.transport.tracing:
            self.transport.record(Event("compute", start, time.perf_counter(), index))

    def _merge(self, name: str, index: int) -> None:
        start = time.perf_counter()
        slot = self.slots[name]
        self.work.merge(self.held[name], slot, [(p.start, p.stop) for p in slot.pieces])
        if self.transport.tracing:
            self.transport.record(Event("merge", start, time.perf_counter(), index))


def _rows(tensors: Tensors, dims: tuple[int, ...], ranges: list[Range]) -> Tensors:
    """Just these rows: nothing is copied where they are all there is, or follow one another."""
    picked = []
    for tensor, dim in zip(tensors, dims):
        parts = [tensor.narrow(dim, a, b - a) for a, b in ranges]
        picked.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim))
    return tuple(picked)


def _view(tensor: Tensor, dim: int, ranges: tuple[Range, ...]) -> Tensor | None:
    if len(ranges) != 1:
        return None
    start, stop = ranges[0]
    return tensor.narrow(dim, start, stop - start)


def _last_uses(steps: tuple[Step, ...]) -> dict[str, int]:
    """The last step that reads each slot."""
    last: dict[str, int] = {}
    for index, step in enumerate(steps):
        names = [n for c in step.computes for n in (c.q, c.kv)]
        names += [t.source_slot for lane in step.sends for t in lane] + list(step.merges)
        last.update(dict.fromkeys(names, index))
    return last

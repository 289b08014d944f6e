"""Runs a plan on one rank, forward or backward: operation by operation, in the order of `plans/program.py`.

It knows slots, lanes and verbs, and no schedule by name. Receives always precede the sends of their step, because on a shared
connection a receive's ready message would queue behind bulk data.
"""

from __future__ import annotations

import time
from collections import deque

import torch
from torch import Tensor

from tokenring.plans.plan import Plan
from tokenring.plans.program import Operation
from tokenring.plans.step import Compute, Piece, Slot, Sum, Transfer
from tokenring.segments import Range
from tokenring.transport import Event, Message, Transport
from tokenring.work import HEAD_DIMS, ROW_DIMS, Tensors, Work

Region = tuple[tuple[Range, ...], Range | None]
"""Rows, and heads (None: all), inside the tensors of a slot."""


def run(plan: Plan, transport: Transport, work: Work) -> Tensors:
    """This rank's part of the plan: `work.result()` when all steps are done."""
    return begin(plan, transport, work).finish()


def begin(plan: Plan, transport: Transport, work: Work) -> Running:
    """Do what comes before the plan's first wait; `finish` does the rest.

    What the caller computes in between hides what is under way. Plans under way together on one lane are finished in the
    order they were begun in.
    """
    try:
        running = Running(plan, transport, work)
        running.go(until="wait")
    except BaseException as error:
        transport.abandon(error)
        raise
    return running


class Running:
    """One rank's slots, and what is under way. Make it with `begin`."""

    def __init__(self, plan: Plan, transport: Transport, work: Work) -> None:
        self.transport, self.work, self.problem = transport, work, plan.problem
        self.steps, self.program = plan.steps(transport.rank), deque(plan.operations(transport.rank))
        self.slots: dict[str, Slot] = {what: plan.problem.own(what, transport.rank) for what in ("q", "kv")}
        self.held: dict[str, Tensors] = dict(work.inputs)
        self.landing: dict[tuple[int, int], list[tuple[Tensor, list[Tensor], int]]] = {}

    def finish(self) -> Tensors:
        """What is left of the plan, then `work.result()`."""
        try:
            self.go()
            return self.work.result()
        except BaseException as error:
            self.transport.abandon(error)
            raise

    def go(self, until: str | None = None) -> None:
        """Do operations in order, up to the first of a kind or to the end."""
        verbs = {
            "open": self._open,
            "push": self._push,
            "wait": self._wait,
            "copy": self._copy,
            "compute": self._compute,
            "sum": self._sum,
            "merge": self._merge,
            "free": self._free,
        }
        while self.program and self.program[0].verb != until:
            operation = self.program.popleft()
            verbs[operation.verb](operation)

    # -- transfers ---------------------------------------------------------------------------------------------------

    def _open(self, operation: Operation) -> None:
        key = operation.lane, operation.step
        messages: list[Message] = []
        for transfer in self.steps[operation.step].receives[operation.lane]:
            self._allocate(transfer.destination_slot, operation.step)
            for views, dim in self._views(transfer.destination_slot, transfer):
                buffer = views[0]
                if len(views) > 1 or not buffer.is_contiguous():
                    rows = sum(v.shape[dim] for v in views)
                    buffer = buffer.new_empty([rows if d == dim else n for d, n in enumerate(buffer.shape)])
                    self.landing.setdefault(key, []).append((buffer, views, dim))
                messages.append((transfer.source, buffer))
        self.transport.open(*key, messages)

    def _push(self, operation: Operation) -> None:
        messages: list[Message] = []
        for transfer in self.steps[operation.step].sends[operation.lane]:
            rows = tuple(_joined(views, dim) for views, dim in self._views(transfer.source_slot, transfer))
            leaving = self.work.on_wire(transfer.what, rows)
            messages += [(transfer.destination, x.contiguous()) for x in leaving]
        self.transport.push(operation.lane, operation.step, messages)

    def _wait(self, operation: Operation) -> None:
        self.transport.wait(operation.lane, operation.step)
        for buffer, views, dim in self.landing.pop((operation.lane, operation.step), ()):
            for view, part in zip(views, buffer.split([v.shape[dim] for v in views], dim)):
                view.copy_(part)

    def _copy(self, operation: Operation) -> None:
        transfer: Transfer = operation.what
        self._allocate(transfer.destination_slot, operation.step)
        ends = zip(self._views(transfer.source_slot, transfer), self._views(transfer.destination_slot, transfer))
        for (sources, dim), (targets, _) in ends:
            parts = _joined(sources, dim).split([t.shape[dim] for t in targets], dim)
            for target, part in zip(targets, parts):
                target.copy_(part)

    def _free(self, operation: Operation) -> None:
        self.held.pop(operation.what, None)

    def _allocate(self, name: str, step: int) -> None:
        if name not in self.held:
            self.slots[name] = next(slot for slot in self.steps[step].slots if slot.name == name)
            self.held[name] = self.work.allocate(self.slots[name])

    def _views(self, name: str, transfer: Transfer) -> list[tuple[list[Tensor], int]]:
        """For each tensor of a slot, views of the rows and heads of a transfer, and the dim that counts rows."""
        return self._region(name, self.slots[name].locate(transfer.pieces), transfer.heads)

    def _region(self, name: str, ranges: tuple[Range, ...], heads: Range | None) -> list[tuple[list[Tensor], int]]:
        slot, found = self.slots[name], []
        for tensor, dim, head_dim in zip(self.held[name], ROW_DIMS[slot.what], HEAD_DIMS[slot.what]):
            tensor = _heads(tensor, head_dim, heads, slot)
            found.append(([tensor.narrow(dim, a, b - a) for a, b in ranges], dim))
        return found

    # -- compute, sum and merge --------------------------------------------------------------------------------------

    def _compute(self, operation: Operation) -> None:
        start = time.perf_counter()
        compute: Compute = operation.what
        sides = (compute.q, compute.kv)
        heads = (compute.heads, self.problem.key_heads(compute.heads))
        inputs = [self._all_rows(name, some) for name, some in zip(sides, heads)]
        partials = self.work.compute(*inputs, compute.tiles)
        for slot, side, (first, tensors) in zip(compute.results, sides, partials):
            rows = self.slots[side].locate(slot.pieces)
            self.slots[slot.name] = slot
            self.held[slot.name] = _rows(tensors, ROW_DIMS[slot.what], [(a - first, b - first) for a, b in rows])
        self._record("compute", start, operation, self.work.kernel)

    def _all_rows(self, name: str, heads: Range | None) -> Tensors:
        slot = self.slots[name]
        return tuple(_heads(t, dim, heads, slot) for t, dim in zip(self.held[name], HEAD_DIMS[slot.what]))

    def _sum(self, operation: Operation) -> None:
        start = time.perf_counter()
        total: Sum = operation.what
        parts = [(total.target.locate(self.slots[name].pieces), self.held[name]) for name in total.sources]
        self.slots[total.target.name] = total.target
        self.held[total.target.name] = self.work.sum(total.target, parts)
        self._record("merge", start, operation)

    def _merge(self, operation: Operation) -> None:
        start = time.perf_counter()
        slot = self.slots[operation.what]
        self.work.merge(self.held[slot.name], slot, _own_ranges(slot.pieces))
        self._record("merge", start, operation)

    def _record(self, kind: str, start: float, operation: Operation, kernel: str = "") -> None:
        if self.transport.tracing:
            self.transport.record(Event(kind, start, time.perf_counter(), operation.step, kernel=kernel))


def _own_ranges(pieces: tuple[Piece, ...]) -> list[Range]:
    return [(p.start, p.stop) for p in pieces]


def _heads(tensor: Tensor, dim: int, heads: Range | None, slot: Slot) -> Tensor:
    if heads is None or heads == slot.heads:
        return tensor
    return tensor.narrow(dim, heads[0] - (slot.heads[0] if slot.heads else 0), heads[1] - heads[0])


def _rows(tensors: Tensors, dims: tuple[int, ...], ranges: list[Range]) -> Tensors:
    """Just these rows: nothing is copied where they are all there is, or follow one another."""
    picked = ([t.narrow(dim, a, b - a) for a, b in ranges] for t, dim in zip(tensors, dims))
    return tuple(_joined(parts, dim) for parts, dim in zip(picked, dims))


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)

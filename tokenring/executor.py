"""Runs a plan on one rank. It knows steps, slots and lanes, and no schedule by name.

Order in one step: the receives of the next step are posted, then this step's sends; tiles are computed while both move; the
partials made for others leave; what came home in the step before is merged. Receives always precede the sends of their step,
because on a shared connection a receive's ready message would queue behind bulk data.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenring.kernels.base import BlockKernel
from tokenring.merge import accumulator_dtype, merge_
from tokenring.plan import PAYLOAD_LANE, RETURN_LANE, Compute, Plan, Slot, Step, Transfer
from tokenring.segments import Range
from tokenring.transport import Event, Message, Transport

ROW_DIMS = {"q": (1,), "kv": (1, 1), "out": (1, 2)}


@dataclass(frozen=True, slots=True)
class Options:
    """What every block of one call shares."""

    kernel: BlockKernel
    scale: float
    softcap: float | None


def run(plan: Plan, transport: Transport, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """This rank's attention: out (B, Sq, Hq, Dv) in the accumulator or input dtype, lse (B, Hq, Sq)."""
    try:
        return _Run(plan, transport, q, k, v, options).result()
    except BaseException as error:
        transport.abandon(error)
        raise


class _Run:
    """One rank's slots, what is under way, and the accumulated (out, lse)."""

    def __init__(self, plan: Plan, transport: Transport, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
        self.transport, self.options = transport, options
        self.steps = plan.steps(transport.rank)
        self.example = {"q": (q,), "kv": (k, v)}
        self.slots: dict[str, Slot] = {what: plan.problem.own(what, transport.rank) for what in ("q", "kv")}
        self.held: dict[str, tuple[Tensor, ...]] = {"q": (q,), "kv": (k, v)}
        self.last_use = _last_uses(self.steps)
        self.landing: dict[tuple[int, int], list[tuple[Tensor, Tensor, int, tuple[Range, ...]]]] = {}
        self.out: Tensor | None = None
        self.lse: Tensor | None = None
        self.rows = q.shape[1]

    def result(self) -> tuple[Tensor, Tensor]:
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
        if self.out is None or self.lse is None:
            self._empty()
        assert self.out is not None and self.lse is not None
        return self.out, self.lse

    # -- transfers ---------------------------------------------------------------------------------------------------

    def _open(self, lane: int, index: int) -> None:
        if index >= len(self.steps):
            return
        step = self.steps[index]
        for slot in step.slots:
            if any(t.destination_slot == slot.name for t in step.receives[lane]):
                self.slots[slot.name] = slot
                self.held[slot.name] = self._allocate(slot)
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
        messages: list[Message] = []
        for tensor, dim in zip(self.held[transfer.source_slot], ROW_DIMS[transfer.what]):
            rows = _view(tensor, dim, ranges)
            if rows is None:
                rows = torch.cat([tensor.narrow(dim, a, b - a) for a, b in ranges], dim=dim)
            if transfer.what == "out" and dim == 1:
                rows = rows.to(self.example["q"][0].dtype)
            messages.append((transfer.destination, rows.contiguous()))
        return messages

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

    def _allocate(self, slot: Slot) -> tuple[Tensor, ...]:
        (q,), (_, v) = self.example["q"], self.example["kv"]
        if slot.what != "out":
            return tuple(t.new_empty(t.shape[0], slot.rows, *t.shape[2:]) for t in self.example[slot.what])
        out = q.new_empty(q.shape[0], slot.rows, q.shape[2], v.shape[3])
        return out, q.new_empty(q.shape[0], q.shape[2], slot.rows, dtype=accumulator_dtype(q.dtype))

    # -- compute and merge -------------------------------------------------------------------------------------------

    def _compute(self, compute: Compute, index: int) -> None:
        start = time.perf_counter()
        (q,), (k, v) = self.held[compute.q], self.held[compute.kv]
        first = min(t.q_start for t in compute.tiles)
        last = max(t.q_stop for t in compute.tiles)
        out, lse = self.options.kernel.forward(
            q, k, v, compute.tiles, (first, last), self.options.scale, self.options.softcap
        )
        if compute.out.rows != last - first:
            rows = [r - first for t in self.slots[compute.q].locate(compute.out.pieces) for r in range(*t)]
            picked = torch.tensor(rows, device=q.device)
            out, lse = out.index_select(1, picked), lse.index_select(2, picked)
        self.slots[compute.out.name] = compute.out
        self.held[compute.out.name] = (out, lse)
        if self.transport.tracing:
            self.transport.record(Event("compute", start, time.perf_counter(), index))

    def _merge(self, name: str, index: int) -> None:
        start = time.perf_counter()
        out, lse = self.held[name]
        ranges = [(p.start, p.stop) for p in self.slots[name].pieces]
        if self.out is None and ranges == [(0, self.rows)]:
            self.out, self.lse = out, lse
            return
        if self.out is None:
            self._empty()
        assert self.out is not None and self.lse is not None
        dtype = accumulator_dtype(self.out.dtype)
        self.out = self.out.to(dtype)
        row = 0
        for a, b in ranges:
            part = slice(row, row + b - a)
            merge_(self.out[:, a:b], self.lse[:, :, a:b], out[:, part], lse[:, :, part])
            row += b - a
        if self.transport.tracing:
            self.transport.record(Event("merge", start, time.perf_counter(), index))

    def _empty(self) -> None:
        (q,), (_, v) = self.example["q"], self.example["kv"]
        dtype = accumulator_dtype(q.dtype)
        self.out = torch.zeros(q.shape[0], self.rows, q.shape[2], v.shape[3], dtype=dtype, device=q.device)
        self.lse = torch.full((q.shape[0], q.shape[2], self.rows), -torch.inf, dtype=dtype, device=q.device)


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

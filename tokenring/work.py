"""What one direction of attention does with a plan: tensors of a slot, one compute, one sum, one merge, the result.

    forward    slots q, kv, out          partials merge by online softmax         result (out, lse)
    backward   slots qd, kv, dq, dkv     partials add up in float32               result (dq, dk, dv)

The backward of a block takes the *whole* row's lse and delta = rowsum(do * out), so that pieces of a row simply add up:

    p = exp(scale q k^T - lse),   dv = p^T do,   ds = p * (do v^T - delta),   dq = scale ds k,   dk = scale ds^T q
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenring.kernels.base import BlockKernel
from tokenring.merge import accumulator_dtype, merge_
from tokenring.plans.step import Slot
from tokenring.segments import Range, Tile

Tensors = tuple[Tensor, ...]
Part = tuple[Sequence[Range], Tensors]
"""A partial, and the rows of the total that its rows are."""

ROW_DIMS = {"q": (1,), "kv": (1, 1), "out": (1, 2), "qd": (1, 1, 2, 2), "dq": (1,), "dkv": (1, 1)}
HEAD_DIMS = {"q": (2,), "kv": (2, 2), "out": (2, 1), "qd": (2, 2, 1, 1, 2), "dq": (2,), "dkv": (2, 2)}
"""Which dim of each tensor of a slot counts rows, and which heads. Queries at rest have their out as well, which never travels."""


@dataclass(frozen=True, slots=True)
class Options:
    """What every block of one call shares."""

    kernel: BlockKernel
    scale: float
    softcap: float | None


class Work(ABC):
    """One direction on one rank. `inputs` are the rank's own slots, "q" and "kv"."""

    inputs: dict[str, Tensors]
    options: Options

    @property
    def kernel(self) -> str:
        """The name of the kernel that computes."""
        return self.options.kernel.name

    @abstractmethod
    def allocate(self, slot: Slot) -> Tensors:
        """Empty tensors for a slot that is to be received, in the dtypes of the wire."""

    @abstractmethod
    def on_wire(self, what: str, tensors: Tensors) -> Tensors:
        """A slot's tensors in the dtypes of the wire."""

    @abstractmethod
    def compute(self, q: Tensors, kv: Tensors, tiles: Sequence[Tile]) -> list[tuple[int, Tensors]]:
        """The partials of some tiles, each with the slot row that its first row is; rows without a tile may lie between."""

    @abstractmethod
    def sum(self, target: Slot, parts: Sequence[Part]) -> Tensors:
        """Partials as one over the rows of `target`, in the accumulator's dtype. The parts may be written over."""

    @abstractmethod
    def merge(self, tensors: Tensors, slot: Slot, ranges: Sequence[Range]) -> None:
        """A partial of this rank's own rows, which lie in `ranges`, joins the result."""

    @abstractmethod
    def result(self) -> Tensors:
        """What the rank has when all is merged."""


class ForwardWork(Work):
    """out and lse."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
        self.inputs, self.options = {"q": (q,), "kv": (k, v)}, options
        self.out: Tensor | None = None
        self.lse: Tensor | None = None
        self.written: list[tuple[Range, Range]] = []
        """Rows and heads of the result that hold something already; the first to come to others is copied."""

    def allocate(self, slot: Slot) -> Tensors:
        (q,), (k, v) = self.inputs["q"], self.inputs["kv"]
        if slot.what == "out":
            return self._empty(slot, q.dtype)
        return tuple(_like(t, slot) for t in ((q,) if slot.what == "q" else (k, v)))

    def on_wire(self, what: str, tensors: Tensors) -> Tensors:
        return (tensors[0].to(self.inputs["q"][0].dtype), tensors[1]) if what == "out" else tensors

    def compute(self, q: Tensors, kv: Tensors, tiles: Sequence[Tile]) -> list[tuple[int, Tensors]]:
        first, last = min(t.q_start for t in tiles), max(t.q_stop for t in tiles)
        o = self.options
        return [(first, o.kernel.forward(*q, *kv, tiles, (first, last), o.scale, o.softcap))]

    def sum(self, target: Slot, parts: Sequence[Part]) -> Tensors:
        (ranges, (out, lse)), later = parts[0], parts[1:]
        wide = accumulator_dtype(out.dtype)
        if list(ranges) == [(0, target.rows)]:
            out = out.to(wide)
        else:
            out, lse = self._empty(target, wide)
            out.zero_()
            lse.fill_(-torch.inf)
            later = parts
        for rows, (part_out, part_lse) in later:
            for (a, b), part in zip(rows, _parts(rows)):
                merge_(out[:, a:b], lse[:, :, a:b], part_out[:, part], part_lse[:, :, part])
        return out, lse

    def merge(self, tensors: Tensors, slot: Slot, ranges: Sequence[Range]) -> None:
        out, lse = tensors
        (q,) = self.inputs["q"]
        if self.out is None and list(ranges) == [(0, q.shape[1])] and slot.heads is None:
            self.out, self.lse, self.written = out, lse, [((0, q.shape[1]), (0, q.shape[2]))]
            return
        total, total_lse = self.result()
        self.out = total = total.to(accumulator_dtype(total.dtype))
        heads = (0, q.shape[2]) if slot.heads is None else slot.heads
        here = slice(*heads)
        for (a, b), part in zip(ranges, _parts(ranges)):
            target, target_lse = total[:, a:b, here], total_lse[:, here, a:b]
            if any(_overlap((a, b), rows) and _overlap(heads, some) for rows, some in self.written):
                merge_(target, target_lse, out[:, part], lse[:, :, part])
            else:
                target.copy_(out[:, part])
                target_lse.copy_(lse[:, :, part])
            self.written.append(((a, b), heads))

    def result(self) -> Tensors:
        if self.out is None or self.lse is None:
            (q,) = self.inputs["q"]
            whole = Slot("", "out", ())
            self.out, self.lse = self._empty(whole, accumulator_dtype(q.dtype), q.shape[1])
            self.out.zero_()
            self.lse.fill_(-torch.inf)
        return self.out, self.lse

    def _empty(self, slot: Slot, dtype: torch.dtype, rows: int | None = None) -> Tensors:
        (q,), (_, v) = self.inputs["q"], self.inputs["kv"]
        rows = slot.rows if rows is None else rows
        heads = q.shape[2] if slot.heads is None else slot.heads[1] - slot.heads[0]
        lse = q.new_empty(q.shape[0], heads, rows, dtype=accumulator_dtype(q.dtype))
        return q.new_empty(q.shape[0], rows, heads, v.shape[3], dtype=dtype), lse


class BackwardWork(Work):
    """dq, dk and dv, summed in float32 (float64 for float64).

    `partial` is the dtype in which partial gradients travel.
    """

    def __init__(self, queries: Tensors, k: Tensor, v: Tensor, options: Options, partial: torch.dtype | None) -> None:
        self.inputs, self.options = {"q": queries, "kv": (k, v)}, options
        self.partial = k.dtype if partial is None else partial
        self.wide = accumulator_dtype(k.dtype)
        self.totals: dict[str, Tensors] = {}

    def allocate(self, slot: Slot) -> Tensors:
        q, k, v = self.inputs["q"][0], *self.inputs["kv"]
        if slot.what == "qd":
            return tuple(
                _like(t, slot, rows, heads) for t, rows, heads in zip(self.inputs["q"], ROW_DIMS["qd"], HEAD_DIMS["qd"])
            )
        if slot.what == "kv":
            return tuple(_like(t, slot) for t in (k, v))
        return tuple(_like(t, slot, dtype=self.partial) for t in ((q,) if slot.what == "dq" else (k, v)))

    def on_wire(self, what: str, tensors: Tensors) -> Tensors:
        return tuple(t.to(self.partial) for t in tensors) if what in ("dq", "dkv") else tensors

    def compute(self, q: Tensors, kv: Tensors, tiles: Sequence[Tile]) -> list[tuple[int, Tensors]]:
        rows = min(t.q_start for t in tiles), max(t.q_stop for t in tiles)
        keys = min(t.k_start for t in tiles), max(t.k_stop for t in tiles)
        o = self.options
        dq, dk, dv = o.kernel.backward(q, kv, tiles, rows, keys, o.scale, o.softcap)
        return [(rows[0], (dq,)), (keys[0], (dk, dv))]

    def sum(self, target: Slot, parts: Sequence[Part]) -> Tensors:
        (ranges, tensors), later = parts[0], parts[1:]
        if list(ranges) == [(0, target.rows)]:
            totals = tuple(t.to(self.wide) for t in tensors)
        else:
            totals = tuple(_like(t, target, dtype=self.wide).zero_() for t in tensors)
            later = parts
        for rows, added in later:
            _add(totals, added, rows)
        return totals

    def merge(self, tensors: Tensors, slot: Slot, ranges: Sequence[Range]) -> None:
        whole = list(ranges) == [(0, self._own(slot.what)[0].shape[1])] and slot.heads is None
        if slot.what not in self.totals and whole:
            self.totals[slot.what] = tuple(t.to(self.wide) for t in tensors)
            return
        totals = self._total(slot.what)
        if slot.heads is not None:
            totals = tuple(t[:, :, slice(*slot.heads)] for t in totals)
        _add(totals, tensors, ranges)

    def result(self) -> Tensors:
        return *self._total("dq"), *self._total("dkv")

    def _own(self, what: str) -> Tensors:
        return self.inputs["q"][:1] if what == "dq" else self.inputs["kv"]

    def _total(self, what: str) -> Tensors:
        if what not in self.totals:
            self.totals[what] = tuple(torch.zeros_like(t, dtype=self.wide) for t in self._own(what))
        return self.totals[what]


def _add(totals: Tensors, tensors: Tensors, ranges: Sequence[Range]) -> None:
    for (a, b), part in zip(ranges, _parts(ranges)):
        for total, tensor in zip(totals, tensors):
            total[:, a:b] += tensor[:, part]


def _like(tensor: Tensor, slot: Slot, row_dim: int = 1, head_dim: int = 2, dtype: torch.dtype | None = None) -> Tensor:
    shape = list(tensor.shape)
    shape[row_dim] = slot.rows
    if slot.heads is not None:
        shape[head_dim] = slot.heads[1] - slot.heads[0]
    return tensor.new_empty(shape, dtype=tensor.dtype if dtype is None else dtype)


def _overlap(a: Range, b: Range) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _parts(ranges: Sequence[Range]) -> list[slice]:
    """Where the ranges lie in a tensor that holds just their rows, in order."""
    parts, row = [], 0
    for a, b in ranges:
        parts.append(slice(row, row + b - a))
        row += b - a
    return parts

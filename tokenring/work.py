"""What one direction of attention does with a plan: tensors of a slot, one compute, one merge, the result.

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
from tokenring.plan import Slot
from tokenring.segments import Range, Tile

Tensors = tuple[Tensor, ...]

ROW_DIMS = {"q": (1,), "kv": (1, 1), "out": (1, 2), "qd": (1, 1, 2, 2), "dq": (1,), "dkv": (1, 1)}
"""Which dim of each tensor of a slot counts rows."""


@dataclass(frozen=True, slots=True)
class Options:
    """What every block of one call shares."""

    kernel: BlockKernel
    scale: float
    softcap: float | None


class Work(ABC):
    """One direction on one rank. `inputs` are the rank's own slots, "q" and "kv"."""

    inputs: dict[str, Tensors]

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

    def allocate(self, slot: Slot) -> Tensors:
        (q,), (k, v) = self.inputs["q"], self.inputs["kv"]
        if slot.what == "out":
            lse = q.new_empty(q.shape[0], q.shape[2], slot.rows, dtype=accumulator_dtype(q.dtype))
            return q.new_empty(q.shape[0], slot.rows, q.shape[2], v.shape[3]), lse
        return tuple(_like(t, slot.rows) for t in ((q,) if slot.what == "q" else (k, v)))

    def on_wire(self, what: str, tensors: Tensors) -> Tensors:
        return (tensors[0].to(self.inputs["q"][0].dtype), tensors[1]) if what == "out" else tensors

    def compute(self, q: Tensors, kv: Tensors, tiles: Sequence[Tile]) -> list[tuple[int, Tensors]]:
        first, last = min(t.q_start for t in tiles), max(t.q_stop for t in tiles)
        o = self.options
        return [(first, o.kernel.forward(*q, *kv, tiles, (first, last), o.scale, o.softcap))]

    def merge(self, tensors: Tensors, slot: Slot, ranges: Sequence[Range]) -> None:
        out, lse = tensors
        if self.out is None and list(ranges) == [(0, self.inputs["q"][0].shape[1])]:
            self.out, self.lse = out, lse
            return
        total, total_lse = self.result()
        self.out = total = total.to(accumulator_dtype(total.dtype))
        for (a, b), part in zip(ranges, _parts(ranges)):
            merge_(total[:, a:b], total_lse[:, :, a:b], out[:, part], lse[:, :, part])

    def result(self) -> Tensors:
        if self.out is None or self.lse is None:
            (q,), (_, v) = self.inputs["q"], self.inputs["kv"]
            dtype = accumulator_dtype(q.dtype)
            self.out = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
            self.lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=dtype, device=q.device)
        return self.out, self.lse


class BackwardWork(Work):
    """dq, dk and dv, summed in float32 (float64 for float64).

    `partial` is the dtype in which partial gradients travel.
    """

    def __init__(self, queries: Tensors, k: Tensor, v: Tensor, options: Options, partial: torch.dtype | None) -> None:
        self.inputs, self.options = {"q": queries, "kv": (k, v)}, options
        self.partial = k.dtype if partial is None else partial
        wide = accumulator_dtype(k.dtype)
        self.dq, self.dk, self.dv = (torch.zeros_like(x, dtype=wide) for x in (queries[0], k, v))

    def allocate(self, slot: Slot) -> Tensors:
        q, k, v = self.inputs["q"][0], *self.inputs["kv"]
        if slot.what == "qd":
            return tuple(_like(t, slot.rows, dim) for t, dim in zip(self.inputs["q"], ROW_DIMS["qd"]))
        if slot.what == "kv":
            return tuple(_like(t, slot.rows) for t in (k, v))
        return tuple(_like(t, slot.rows, dtype=self.partial) for t in ((q,) if slot.what == "dq" else (k, v)))

    def on_wire(self, what: str, tensors: Tensors) -> Tensors:
        return tuple(t.to(self.partial) for t in tensors) if what in ("dq", "dkv") else tensors

    def compute(self, q: Tensors, kv: Tensors, tiles: Sequence[Tile]) -> list[tuple[int, Tensors]]:
        rows = min(t.q_start for t in tiles), max(t.q_stop for t in tiles)
        keys = min(t.k_start for t in tiles), max(t.k_stop for t in tiles)
        o = self.options
        dq, dk, dv = o.kernel.backward(q, kv, tiles, rows, keys, o.scale, o.softcap)
        return [(rows[0], (dq,)), (keys[0], (dk, dv))]

    def merge(self, tensors: Tensors, slot: Slot, ranges: Sequence[Range]) -> None:
        totals = (self.dq,) if slot.what == "dq" else (self.dk, self.dv)
        for (a, b), part in zip(ranges, _parts(ranges)):
            for total, tensor in zip(totals, tensors):
                total[:, a:b] += tensor[:, part]

    def result(self) -> Tensors:
        return self.dq, self.dk, self.dv


def _like(tensor: Tensor, rows: int, dim: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    shape = [rows if d == dim else n for d, n in enumerate(tensor.shape)]
    return tensor.new_empty(shape, dtype=tensor.dtype if dtype is None else dtype)


def _parts(ranges: Sequence[Range]) -> list[slice]:
    """Where the ranges lie in a tensor that holds just their rows, in order."""
    parts, row = [], 0
    for a, b in ranges:
        parts.append(slice(row, row + b - a))
        row += b - a
    return parts

"""The online-softmax merge of `tokenring.merge` as one Triton kernel: each number is read once and written once.

Only `merge.merge_` imports this module, for CUDA tensors where Triton is installed. Triton's interpreter runs it on the CPU for
the tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 2048
"""Numbers of `out` that one program holds."""


@triton.jit
def _weights(a, b):
    """The shares of two partials, and their log-sum-exp, from their own; of two empty ones the shares are 1 and 0."""
    high = tl.maximum(a, b)
    empty = high == -float("inf")
    pivot = tl.where(empty, 0.0, high)
    own = tl.where(empty, 1.0, tl.exp(a - pivot))
    new = tl.exp(b - pivot)
    total = own + new
    return own / total, new / total, tl.where(empty, high, pivot + tl.log(total))


@triton.jit
def _merge(
    out,
    lse,
    part_out,
    part_lse,
    rows,
    dims,
    heads,
    out_batch,
    out_row,
    out_head,
    lse_batch,
    lse_head,
    lse_row,
    part_batch,
    part_row,
    part_head,
    part_lse_batch,
    part_lse_head,
    part_lse_row,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
):
    # 64-bit: a row of a long sequence times its stride passes 2^31.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    dim = tl.arange(0, DIMS)
    here, inside = row < rows, (row < rows)[:, None] & (dim < dims)[None, :]
    lse += batch * lse_batch + head * lse_head + row * lse_row
    part_lse += batch * part_lse_batch + head * part_lse_head + row * part_lse_row
    out += batch * out_batch + head * out_head + row[:, None] * out_row + dim[None, :]
    part_out += batch * part_batch + head * part_head + row[:, None] * part_row + dim[None, :]
    own, new, both = _weights(tl.load(lse, mask=here, other=0.0), tl.load(part_lse, mask=here, other=0.0))
    tl.store(lse, both, mask=here)
    x = tl.load(out, mask=inside, other=0.0)
    y = tl.load(part_out, mask=inside, other=0.0).to(x.dtype)
    # Each form is exact where its share is 0.
    merged = tl.where((new < 0.5)[:, None], x + new[:, None] * (y - x), y + own[:, None] * (x - y))
    tl.store(out, merged, mask=inside)


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """As `tokenring.merge.merge_`, for `out` whose head dims lie side by side."""
    batch, rows, heads, dims = out.shape
    if not out.numel():
        return
    part_out = part_out if part_out.stride(3) == 1 else part_out.contiguous()
    width = triton.next_power_of_2(dims)
    height = max(1, _NUMBERS // width)
    strides = (*out.stride()[:3], *lse.stride(), *part_out.stride()[:3], *part_lse.stride())
    with torch.cuda.device_of(out):
        _merge[(triton.cdiv(rows, height), batch * heads)](
            out, lse, part_out, part_lse, rows, dims, heads, *strides, ROWS=height, DIMS=width
        )

"""Phase 3 as one Triton kernel: it loads scattered rows of k and v by plain pointers and resumes from the anchor's state.

    m = lse, l = 1, acc = out    of the anchor region, then for each run of the group's columns
    s = scale q k^T,  m' = max(m, max s),  acc = acc exp(m - m') + exp(s - m') v,  l = l exp(m - m') + sum exp(s - m')
    out = acc / l,  lse = m + log l

(arXiv 2505.23520, section 3.4.) One program computes a tile of a group's rows for one query head; tiles of a group read the same
columns, one after another in the grid, so they find them in the cache. Every kept column precedes its group: no causal mask.
Only `sparse_attn.kernels.choice` imports this module. Triton's interpreter runs it on the CPU for the tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_attn.kernels.torch_kernel import TorchKernel
from sparse_attn.stripes import StripePlan

LEAST = 16
"""Rows, columns and dims that a matrix product of Triton has at least."""


@triton.jit
def _stripes(
    q,
    k,
    v,
    out,
    lse,
    indptr,
    indices,
    tile_rows,
    tile_stops,
    tile_groups,
    scale,
    dims,
    v_dims,
    batch,
    heads,
    lists,
    per_key,
    per_list,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    out_batch,
    out_row,
    out_head,
    lse_batch,
    lse_head,
    lse_row,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIMS: tl.constexpr,
    V_DIMS: tl.constexpr,
):
    tile = tl.program_id(0)
    entry, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    # 64-bit: a row of a long sequence times its stride passes 2^31.
    row = tl.load(tile_rows + tile).to(tl.int64) + tl.arange(0, ROWS)
    here = row < tl.load(tile_stops + tile)
    which = (tl.load(tile_groups + tile).to(tl.int64) * batch + entry) * lists + head // per_list
    first, stop = tl.load(indptr + which), tl.load(indptr + which + 1)
    dim, v_dim = tl.arange(0, DIMS), tl.arange(0, V_DIMS)
    q += entry * q_batch + head * q_head
    k += entry * k_batch + (head // per_key) * k_head
    v += entry * v_batch + (head // per_key) * v_head
    out += entry * out_batch + head * out_head
    lse += entry * lse_batch + head * lse_head
    inside = here[:, None] & (v_dim < v_dims)[None, :]
    mine = tl.load(q + row[:, None] * q_row + dim[None, :], mask=here[:, None] & (dim < dims)[None, :], other=0.0)
    acc = tl.load(out + row[:, None] * out_row + v_dim[None, :], mask=inside, other=0.0)
    high = tl.load(lse + row * lse_row, mask=here, other=0.0)
    total = tl.where(here, 1.0, 1.0).to(high.dtype)
    for start in range(first, stop, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        valid = at < stop
        column = tl.load(indices + at, mask=valid, other=0).to(tl.int64)
        keys = tl.load(
            k + column[None, :] * k_row + dim[:, None], mask=valid[None, :] & (dim < dims)[:, None], other=0.0
        )
        scores = tl.dot(mine, keys, input_precision="ieee").to(high.dtype) * scale
        scores = tl.where(valid[None, :], scores, -float("inf"))
        above = tl.maximum(high, tl.max(scores, 1))
        shrink = tl.exp(high - above)
        weights = tl.exp(scores - above[:, None])
        values = tl.load(
            v + column[:, None] * v_row + v_dim[None, :], mask=valid[:, None] & (v_dim < v_dims)[None, :], other=0.0
        )
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee").to(acc.dtype)
        total = total * shrink + tl.sum(weights, 1)
        high = above
    tl.store(out + row[:, None] * out_row + v_dim[None, :], acc / total[:, None], mask=inside)
    tl.store(lse + row * lse_row, high + tl.log(total), mask=here)


class TritonKernel(TorchKernel):
    """The anchor region as in `TorchKernel`, the stripes in one launch.

    Args:
        name: the block kernel of the anchor region.
        rows, columns: of a tile; powers of two of 16 or more. A group's length need not be a multiple.
    """

    def __init__(self, name: str, q: Tensor, v: Tensor, scale: float, rows: int = 64, columns: int = 64) -> None:
        super().__init__(name, q, v, scale)
        for what, value in (("rows", rows), ("columns", columns)):
            if value < LEAST or value & (value - 1):
                raise ValueError(f"Triton tiles got {what}={value}; give a power of two of {LEAST} or more")
        if q.device.type == "cpu" and isinstance(_stripes, triton.JITFunction):
            raise ValueError('kernel="triton" needs a GPU and got tensors on cpu; use kernel="auto"')
        if q.is_cuda and q.dtype == torch.float64:
            raise ValueError('Triton has no float64 matrix products on GPUs; use kernel="auto" for float64')
        self.rows, self.columns = rows, columns

    def stripes_(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: StripePlan) -> None:
        """Every group's columns join (out, lse) of its rows, in place."""
        if not len(plan.indices):
            return
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        tiles = [
            (row, group.rows[1], number)
            for number, group in enumerate(plan.geometry.groups)
            for row in range(*group.rows, self.rows)
        ]
        starts, stops, groups = torch.tensor(tiles, dtype=torch.int32, device=q.device).T.contiguous()
        strides = (x.stride(dim) for x in (q, k, v, out) for dim in (0, 1, 2))
        grid = (len(tiles), q.shape[0] * q.shape[2])
        widths = [max(LEAST, triton.next_power_of_2(x.shape[3])) for x in (q, v)]
        _stripes[grid](
            q, k, v, out, lse, plan.indptr.to(q.device), plan.indices, starts, stops, groups, self.blocks.scale,
            q.shape[3], v.shape[3], q.shape[0], q.shape[2], plan.heads, q.shape[2] // k.shape[2], q.shape[2] // plan.heads,
            *strides, *lse.stride(), ROWS=self.rows, COLUMNS=self.columns, DIMS=widths[0], V_DIMS=widths[1],
        )  # fmt: skip

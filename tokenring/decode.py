"""A few new tokens against a key/value cache that is spread over ranks.

Every rank has the same queries and its own cache rows. Each computes a partial over its rows; the partials (out and lse, in
float32, one message to each peer) are merged in rank order on every rank, so all ranks end with the same bits:

    lse = log sum_r exp(lse_r),   out = sum_r exp(lse_r - lse) out_r

This is pass-Q with nothing to pass: the cache never moves (flash-decoding over ranks; Meta's pass-Q, arXiv 2411.01783).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenring import kernels
from tokenring.arguments import check_options, check_tensors
from tokenring.mask import Mask
from tokenring.merge import accumulator_dtype, merge_, merge_sinks_
from tokenring.segments import Tile
from tokenring.transport import Transport, connect


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    group: Any = None,
    lengths: Tensor,
    positions: Tensor,
    mask: str = "causal",
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens over the whole spread cache.

    Args:
        q: (B, Sq, Hq, D), the same on every rank: the last Sq positions of each sequence, whose keys are in the cache already.
        k_cache: (B, S_cache, Hkv, D), v_cache: (B, S_cache, Hkv, Dv): this rank's rows; S_cache may differ per rank and be 0.
        group: ProcessGroup, 1-D DeviceMesh, LocalGroup, or None.
        lengths: int (B,), how many of this rank's rows are valid, counted from the front.
        positions: int (B, S_cache), their global positions, in any order.
        mask: "causal" or "full" (the new tokens see one another too).
        scale, softcap, sinks: as in `tokenring.attention`.
        return_lse: also return lse (B, Hq, Sq).

    Returns:
        out (B, Sq, Hq, Dv) in q's dtype, bitwise the same on every rank.

    >>> q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 6, 2, 8)
    >>> decode_attention(q, k, k, lengths=torch.tensor([5]), positions=torch.arange(6)[None]).shape
    torch.Size([1, 1, 4, 8])
    """
    runtime = connect(group)
    _check(q, k_cache, v_cache, lengths, positions, mask)
    check_options(q, sinks, scale, softcap)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    newest = _query_positions(q, lengths, positions, runtime) if mask == "causal" and q.shape[1] > 1 else None
    out, lse = _partial(q, k_cache, v_cache, lengths.tolist(), positions, newest, scale, softcap)
    if runtime.world > 1:
        packed = torch.cat([out, lse.transpose(1, 2).unsqueeze(-1)], dim=-1).contiguous()
        for rank, part in enumerate(runtime.all_gather(packed, same_shape=True)):
            part_out, part_lse = part[..., :-1], part[..., -1].transpose(1, 2)
            if rank == 0:
                out, lse = part_out.clone(), part_lse.clone()
            else:
                merge_(out, lse, part_out, part_lse)
    if sinks is not None:
        merge_sinks_(out, lse, sinks)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, positions: Tensor, mask: str) -> None:
    check_tensors(q, k_cache, v_cache)
    batch, rows = k_cache.shape[:2]
    if tuple(lengths.shape) != (batch,) or tuple(positions.shape) != (batch, rows):
        raise ValueError(
            f"lengths {tuple(lengths.shape)} and positions {tuple(positions.shape)} must be ({batch},) and ({batch}, {rows}) for this cache"
        )
    if lengths.is_floating_point() or positions.is_floating_point():
        raise ValueError(f"lengths are {lengths.dtype} and positions {positions.dtype}; both must be integers")
    if batch and (int(lengths.min()) < 0 or int(lengths.max()) > rows):
        raise ValueError(f"lengths {lengths.tolist()} must lie between 0 and the {rows} rows of the cache")
    if mask not in ("causal", "full"):
        raise ValueError(f'mask is {mask!r}; decoding takes "causal" or "full"')


def _query_positions(q: Tensor, lengths: Tensor, positions: Tensor, runtime: Transport) -> Tensor:
    """(B, Sq): the last Sq positions of each sequence, from the largest position that any rank holds."""
    valid = torch.arange(positions.shape[1], device=positions.device)[None] < lengths[:, None].to(positions.device)
    columns = [
        positions.masked_fill(~valid, -1).to(torch.int64),
        torch.full((q.shape[0], 1), -1, device=positions.device),
    ]
    newest = torch.cat(columns, dim=1).amax(dim=1)
    last = torch.stack(runtime.all_gather(newest, same_shape=True, control=True)).amax(dim=0)
    return last[:, None] - torch.arange(q.shape[1] - 1, -1, -1, device=last.device)


def _partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    positions: Tensor,
    newest: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) over this rank's valid rows, in the accumulator dtype; batch rows of different lengths one by one."""
    dtype = accumulator_dtype(q.dtype)
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=dtype, device=q.device)
    kernel = kernels.choose("auto", q, v, softcap)
    for row, length in enumerate(lengths):
        here = slice(row, row + 1)
        if length == 0 or q.shape[1] == 0:
            continue
        keys, values = k[here, :length], v[here, :length]
        if newest is None:
            tiles = (Tile(0, q.shape[1], 0, length),)
            out[here], lse[here] = kernel.forward(q[here], keys, values, tiles, (0, q.shape[1]), scale, softcap)
            continue
        allowed = Mask.causal().dense(newest[row], positions[row, :length])
        for index in range(q.shape[1]):
            picked = allowed[index].nonzero().flatten()
            if picked.numel():
                one = (Tile(0, 1, 0, picked.numel()),)
                some = keys.index_select(1, picked), values.index_select(1, picked)
                part = kernel.forward(q[here, index : index + 1], *some, one, (0, 1), scale, softcap)
                out[here, index : index + 1], lse[here, :, index : index + 1] = part
    return out, lse

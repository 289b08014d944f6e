"""Dense attention in float64, written out: the oracle for everything that attends."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of (B, S, H, D) tensors under a boolean matrix (Sq, Sk); rows without keys give 0 and -inf."""
    q, k, v = q.double(), k.double(), v.double()
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, -torch.inf)
    empty = ~allowed.any(dim=1)
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, column.masked_fill(empty[:, None], -torch.inf)], dim=-1)
        v = torch.cat([v, torch.zeros_like(v[:, :1])], dim=1)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def random_qkv(
    batch: int,
    length: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    *,
    kv_length: int | None = None,
    v_dim: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct normal values in every row, the same for one seed."""
    make = torch.Generator().manual_seed(seed)
    keys = length if kv_length is None else kv_length
    shapes = ((batch, length, q_heads, dim), (batch, keys, kv_heads, dim), (batch, keys, kv_heads, v_dim or dim))
    q, k, v = (torch.randn(shape, generator=make, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v

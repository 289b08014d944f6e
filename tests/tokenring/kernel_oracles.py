"""Dense block attention in float64 with the whole row's lse and delta, and the bands that blocks come with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tests.oracle import dense_attention, random_qkv


def band(rows: int, keys: int, lower: int | None, upper: int | None) -> Tensor:
    """Which pairs of a rectangle a band allows."""
    difference = torch.arange(keys)[None, :] - torch.arange(rows)[:, None]
    return (difference >= (-rows if lower is None else lower)) & (difference <= (keys if upper is None else upper))


def bands(rows: int, keys: int) -> Iterator[tuple[int | None, int | None]]:
    """Every band, bounds that bind nothing among them, under which each row of the rectangle sees a key."""
    for lower in (None, *range(-rows - 1, keys + 1)):
        for upper in (None, *range(-1, keys + 2)):
            if band(rows, keys, lower, upper).any(1).all():
                yield lower, upper


def gradients(
    queries: tuple[Tensor, ...], k: Tensor, v: Tensor, allowed: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of a block whose rows have lse and delta (B, H, Sq): p = exp(s - lse), ds = p (do v - delta)."""
    q, do, lse, delta = (x.double() for x in queries)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.double().repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
    slope = torch.ones_like(scores)
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent**2
    weights = torch.exp(scores - lse[..., None]) * allowed
    ds = weights * (torch.einsum("bqhd,bkhd->bhqk", do, values) - delta[..., None]) * slope * scale
    dk, dv = torch.einsum("bhqk,bqhd->bkhd", ds, q), torch.einsum("bhqk,bqhd->bkhd", weights, do)
    dk, dv = (x.unflatten(2, (-1, group)).sum(3) for x in (dk, dv))
    return torch.einsum("bhqk,bkhd->bqhd", ds, keys), dk, dv


def block_of_a_longer_row(
    rows: int,
    keys: int,
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    allowed: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    v_dim: int | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:
    """(q, do, lse, delta), k, v where the rows also attend elsewhere: their lse is above the block's, delta is any."""
    q, k, v = random_qkv(2, rows, *heads, dim, dtype, kv_length=keys, v_dim=v_dim, seed=rows + 100 * keys)
    do = random_qkv(2, rows, heads[0], 1, v_dim or dim, dtype, seed=7)[0]
    _, lse = dense_attention(q, k, v, allowed, scale=scale, softcap=softcap)
    make = torch.Generator().manual_seed(rows + keys)
    lse = lse + torch.rand(lse.shape, generator=make, dtype=torch.float64)
    delta = torch.randn(lse.shape, generator=make, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (q, do, lse.to(wide), delta.to(wide)), k, v

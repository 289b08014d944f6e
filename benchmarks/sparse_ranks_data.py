"""What the benchmarks of AnchorAttention over ranks compute on, and the theta that keeps a share of its columns."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparse_attn import AnchorConfig, plan

NEAR = 0.02
"""How far from the share, relative to it, is near enough."""


def planted(length: int, heads: tuple[int, int], dim: int, share: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v: every key head has keys of its own, a share of them, where its queries look, and all see the first four."""
    make = torch.Generator().manual_seed(0)
    wanted = torch.nn.functional.normalize(torch.randn(heads[1], dim, generator=make), dim=1)
    q = torch.randn(1, length, heads[0], dim, generator=make) + 6 * wanted.repeat_interleave(heads[0] // heads[1], 0)
    k, v = (torch.randn(1, length, heads[1], dim, generator=make) for _ in range(2))
    chosen = torch.rand(length, heads[1], 1, generator=make) < share
    k += 10 * wanted * chosen
    k[:, :4] += 12 * wanted
    return tuple(x.to(dtype) for x in (q, k, v))


def at_stripes(q: Tensor, k: Tensor, config: AnchorConfig, target: float) -> AnchorConfig:
    """The configuration with the theta that keeps a share of columns (the paper's ratio), all heads together."""
    low, high = -5.0, 25.0
    for _ in range(12):
        middle = (low + high) / 2
        found = plan(q, k, config=replace(config, theta=middle)).stripe_density
        if abs(found - target) <= NEAR * target:
            return replace(config, theta=middle)
        low, high = (middle, high) if found < target else (low, middle)
    return replace(config, theta=high)

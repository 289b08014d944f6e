"""Batches and partitions that several tests share."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from token_reduction import Budget, Reducer, TokenShard, VisualTokens, build, methods

GRIDS = ((5, 4, 4), (1, 3, 5), (3, 2, 6))
METHODS = tuple(name for name in methods() if name != "identity")


def batch(grids=GRIDS, width: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32) -> VisualTokens:
    """Ragged items whose frames drift slowly, as in a video; positions start at 100 and have three axes. Every channel is there."""
    generator = torch.Generator().manual_seed(seed)
    parts, positions, offsets = [], [], [0]
    for t, h, w in grids:
        scene = torch.randn(1, h * w, width, generator=generator)
        drift = 0.3 * torch.randn(t, h * w, width, generator=generator).cumsum(0)
        parts.append((scene + drift).reshape(-1, width))
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        positions.append(100 + offsets[-1] + torch.stack([axis.reshape(-1) for axis in axes]))
        offsets.append(offsets[-1] + t * h * w)
    x = torch.cat(parts).to(dtype)
    return VisualTokens(x, offsets, grids, torch.cat(positions, 1), channels_of(x, len(grids), generator))


def channels_of(x: Tensor, items: int, generator: torch.Generator) -> dict[str, object]:
    """Every channel, of plain random numbers; attention of two layers is positive and heavy-tailed."""
    n, width = x.shape
    return {
        "cls_attn": torch.rand(n, 2, generator=generator) ** 4 / n,
        "recv_attn": torch.rand(n, 2, generator=generator) ** 4 / n,
        "cls_logits": 3 * torch.randn(n, 3, generator=generator),
        "keys": x.float() @ torch.randn(width, 6, generator=generator),
        "queries": torch.randn(n, 6, generator=generator),
        "patches": torch.randn(n, width, generator=generator),
        "pixels": torch.rand(n, 4, 3, generator=generator),
        "text": [torch.randn(3 + item, width, generator=generator) for item in range(items)],
    }


def one(x: Tensor, grid: tuple[int, int, int] | None = None, **channels: Tensor) -> VisualTokens:
    """A single item; one frame of one line where no grid is given."""
    return VisualTokens(x, [0, x.shape[0]], [grid or (1, 1, x.shape[0])], torch.arange(x.shape[0])[None], channels)


def keep(
    method: str | Reducer, x: Tensor, budget: Budget, grid: tuple[int, int, int] | None = None, **channels: Tensor
) -> list[int]:
    """Kept indices of a single item."""
    reducer = build(method) if isinstance(method, str) else method
    return reducer.reduce(one(x, grid, **channels), budget).index.tolist()


def cut_frames(tokens: VisualTokens, world: int, uneven: bool = False) -> list[TokenShard]:
    """Every rank gets whole frames; uneven: the first rank nothing, the last rank most."""
    frame_of_row, frames = [], 0
    for t, h, w in tokens.grid:
        frame_of_row.append(frames + torch.arange(t * h * w) // (h * w))
        frames += t
    frame = torch.cat(frame_of_row)
    cuts = [0, *(min(rank, 2) for rank in range(world - 1)), frames] if uneven else None
    cuts = cuts or [frames * rank // world for rank in range(world + 1)]
    return [tokens.shard(((frame >= first) & (frame < last)).nonzero()[:, 0]) for first, last in pairwise(cuts)]


def cut_anywhere(tokens: VisualTokens, world: int, seed: int = 3) -> list[TokenShard]:
    """Every row goes to a rank drawn at random."""
    owner = torch.randint(0, world, (tokens.x.shape[0],), generator=torch.Generator().manual_seed(seed))
    return [tokens.shard((owner == rank).nonzero()[:, 0]) for rank in range(world)]

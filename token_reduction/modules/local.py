"""What several compressors share: cutting a map into cells, and attention of one query over its cell."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_map(x: Tensor, channels: int, side: int, name: str) -> None:
    """A map (B, h, w, channels) whose sides are multiples of `side`, or ValueError."""
    if x.dim() != 4 or x.shape[3] != channels:
        raise ValueError(f"{name} takes a map (B, h, w, {channels}), got {tuple(x.shape)}")
    if x.shape[1] % side or x.shape[2] % side:
        raise ValueError(
            f"{name} cuts cells of {side} x {side}; {x.shape[1]} x {x.shape[2]} is no multiple; pad the map"
        )


def check_rows(x: Tensor, rows: str, width: int, name: str) -> None:
    """Rows (`rows`, width), such as "B, n", or ValueError."""
    if x.dim() != rows.count(",") + 2 or x.shape[-1] != width:
        raise ValueError(f"{name} takes ({rows}, {width}), got {tuple(x.shape)}")


def check_same_grid(x: Tensor, y: Tensor, name: str) -> None:
    """Maps of one batch and one grid, or ValueError."""
    if x.shape[:3] != y.shape[:3]:
        raise ValueError(
            f"{name} looks at one grid on all levels, got maps {tuple(x.shape[:3])} and {tuple(y.shape[:3])} (B, h, w)"
        )


def check_sizes(**sizes: int) -> None:
    """Whole numbers of 1 or more, or ValueError; `width` must divide into `heads`."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} is {size!r}; give a whole number of 1 or more")
    if "heads" in sizes and sizes["width"] % sizes["heads"]:
        raise ValueError(f"width {sizes['width']} does not divide into {sizes['heads']} heads")


def cells(x: Tensor, side: int) -> Tensor:
    """(B, h, w, C) -> (B, cells, side^2, C), cells in raster order."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // side, side, w // side, side, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // side * (w // side), side * side, c)


class CellAttention(nn.Module):
    """Each cell's one query attends to its own keys: q (B, n, C), k, v (B, n, m, C) -> (B, n, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        check_sizes(width=width, heads=heads)
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, n, m, c = k.shape
        query = self.q(q).view(b * n, 1, self.heads, c // self.heads).transpose(1, 2)
        key, value = (
            part(x).view(b * n, m, self.heads, c // self.heads).transpose(1, 2)
            for part, x in ((self.k, k), (self.v, v))
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(b, n, c))


def perceptron(first: int, width: int, last: int) -> nn.Sequential:
    """Linear, GELU, Linear."""
    return nn.Sequential(nn.Linear(first, width), nn.GELU(), nn.Linear(width, last))


def pooled(x: Tensor, h: int, w: int) -> Tensor:
    """Bilinear (B, H, W, C) -> (B, h w, C)."""
    small = nn.functional.interpolate(x.permute(0, 3, 1, 2), (h, w), mode="bilinear", align_corners=False)
    return small.flatten(2).mT


def flat(x: Tensor) -> Tensor:
    """(B, h, w, C) -> (B, h w, C)."""
    return torch.flatten(x, 1, 2)

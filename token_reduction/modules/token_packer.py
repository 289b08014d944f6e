"""TokenPacker: a coarse query for each cell takes in the cell's fine, multi-level features.

    q = LN(Linear(bilinear downsample of x by s)),   k, v = LN(MLP(levels side by side))
    out = MLP(q + attention of each query over its s x s cell)

Source: TokenPacker, "Efficient Visual Projector for Multimodal LLM", section 3.
"""

from __future__ import annotations

from torch import Tensor, nn

from token_reduction.modules.local import (
    CellAttention,
    cells,
    check_map,
    check_same_grid,
    check_sizes,
    perceptron,
    pooled,
)


class TokenPacker(nn.Module):
    """(B, h, w, C) with levels (B, h, w, levels x C) -> (B, h w / s^2, width).

    Args:
        channels: C. levels: encoder layers side by side (4 in the paper). width: of the language model. scale: s; 24 x 24 gives
            144, 64, 36 tokens for 2, 3, 4. heads: of the cell attention (8).

    >>> import torch
    >>> module = TokenPacker(channels=8, levels=2, width=12, scale=2, heads=2)
    >>> module(torch.zeros(3, 4, 6, 8), torch.zeros(3, 4, 6, 16)).shape
    torch.Size([3, 6, 12])
    """

    def __init__(self, channels: int, levels: int, width: int, scale: int = 2, heads: int = 8) -> None:
        super().__init__()
        check_sizes(channels=channels, levels=levels, scale=scale)
        self.channels, self.levels, self.scale = channels, levels, scale
        self.query = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels))
        self.key, self.value = (
            nn.Sequential(perceptron(levels * channels, channels, channels), nn.LayerNorm(channels)) for _ in range(2)
        )
        self.attention = CellAttention(channels, heads)
        self.out = perceptron(channels, width, width)

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        check_map(x, self.channels, self.scale, "TokenPacker")
        check_map(levels, self.levels * self.channels, self.scale, "TokenPacker's levels")
        check_same_grid(x, levels, "TokenPacker")
        _, h, w, _ = x.shape
        query = self.query(pooled(x, h // self.scale, w // self.scale))
        fine = cells(levels, self.scale)
        return self.out(query + self.attention(query, self.key(fine), self.value(fine)))

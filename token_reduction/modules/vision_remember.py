"""Vision Remember: between decoder layers, compressed visual tokens look again at the encoder's features around them.

    token (i, j) of h' x w' attends to its cell of every level's map: local keys and values, several depths of the encoder

Source: Vision Remember, "Recovering Visual Information in Efficient LVLM with Vision Feature Resampling"; abstract public, form
ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from token_reduction.modules.local import CellAttention, cells, check_map, check_rows, check_same_grid, check_sizes


class VisionRemember(nn.Module):
    """(B, n, D) visual states with levels, each (B, h, w, C), n = h w / side^2 -> (B, n, D).

    Args:
        width: D. channels: C. levels: how many maps. side: of a token's cell.

    >>> module = VisionRemember(12, 8, levels=2, side=2, heads=2)
    >>> module(torch.zeros(1, 4, 12), [torch.zeros(1, 4, 4, 8)] * 2).shape
    torch.Size([1, 4, 12])
    """

    def __init__(self, width: int, channels: int, levels: int, side: int = 2, heads: int = 8) -> None:
        super().__init__()
        check_sizes(channels=channels, levels=levels, side=side)
        self.channels, self.side = channels, side
        self.norm = nn.LayerNorm(width)
        self.lift = nn.ModuleList(nn.Linear(channels, width) for _ in range(levels))
        self.depth = nn.Parameter(torch.zeros(levels, width))
        self.attention = CellAttention(width, heads)

    def forward(self, tokens: Tensor, levels: list[Tensor]) -> Tensor:
        check_rows(tokens, "B, n", self.depth.shape[1], "VisionRemember")
        if len(levels) != len(self.lift):
            raise ValueError(f"VisionRemember has {len(self.lift)} levels, got {len(levels)}")
        fine = []
        for level, lift, depth in zip(levels, self.lift, self.depth, strict=True):
            check_map(level, self.channels, self.side, "VisionRemember")
            check_same_grid(level, levels[0], "VisionRemember")
            fine.append(cells(lift(level) + depth, self.side))
        keys = torch.cat(fine, 2)
        if keys.shape[1] != tokens.shape[1]:
            raise ValueError(f"{keys.shape[1]} cells for {tokens.shape[1]} tokens; each token has a cell of its own")
        return tokens + self.attention(self.norm(tokens), keys, keys)

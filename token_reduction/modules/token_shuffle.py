"""Token-Shuffle: fold s x s neighbours into channels, run the blocks on fewer tokens, unfold.

    fold     (h w, D) -> (h w / s^2, D):   each of s^2 neighbours to D / s^2, side by side, then residual MLPs
    unfold   the reverse: D -> s^2 x D / s^2 -> D each

Source: "Token-Shuffle: Towards High-Resolution Image Generation with Autoregressive Models"; block sizes ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from token_reduction.modules.local import cells, check_map


class TokenShuffle(nn.Module):
    """`fold` before the blocks, `unfold` behind them; the count comes back exactly.

    Args:
        channels: D, a multiple of side^2. depth: residual perceptrons on either side.

    >>> module = TokenShuffle(8, side=2)
    >>> folded = module.fold(torch.zeros(1, 4, 6, 8))
    >>> folded.shape, module.unfold(folded, 4, 6).shape
    (torch.Size([1, 6, 8]), torch.Size([1, 4, 6, 8]))
    """

    def __init__(self, channels: int, side: int = 2, depth: int = 2) -> None:
        super().__init__()
        if channels % side**2:
            raise ValueError(f"{channels} channels do not divide by the {side**2} tokens that are folded into one")
        self.channels, self.side = channels, side
        self.narrow = nn.Linear(channels, channels // side**2)
        self.widen = nn.Linear(channels // side**2, channels)
        self.before = nn.ModuleList(_Residual(channels) for _ in range(depth))
        self.behind = nn.ModuleList(_Residual(channels) for _ in range(depth))

    def fold(self, x: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h w / s^2, D)."""
        check_map(x, self.channels, self.side, "TokenShuffle")
        rows = cells(self.narrow(x), self.side).flatten(2)
        for block in self.before:
            rows = block(rows)
        return rows

    def unfold(self, rows: Tensor, h: int, w: int) -> Tensor:
        """(B, h w / s^2, D) -> (B, h, w, D)."""
        s, b = self.side, len(rows)
        if rows.shape[1] * s * s != h * w:
            raise ValueError(f"{rows.shape[1]} folded tokens make {rows.shape[1] * s * s}, not {h} x {w}")
        for block in self.behind:
            rows = block(rows)
        rows = rows.view(b, h // s, w // s, s, s, -1).permute(0, 1, 3, 2, 4, 5)
        return self.widen(rows.reshape(b, h, w, -1))


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))

"""TokenFLEX: any number of tokens from one projector, drawn anew for each training step.

    adaptive average pooling to a x b cells, then SwiGLU:  W3 (silu(W1 x) * W2 x)

Source: TokenFLEX, "Unified VLM Training for Flexible Visual Tokens Inference"; sizes ours where the abstract is silent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TokenFlex(nn.Module):
    """(B, h, w, C) -> (B, count, width) for any square count.

    Args:
        counts: token counts drawn in training mode when none is asked for; evaluation then takes the largest.

    >>> TokenFlex(8, 12, counts=(4, 16))(torch.zeros(2, 7, 5, 8), 9).shape
    torch.Size([2, 9, 12])
    """

    def __init__(self, channels: int, width: int, counts: Sequence[int] = (64, 144, 256)) -> None:
        super().__init__()
        self.counts = tuple(counts)
        for count in self.counts:
            _side(count)
        hidden = 4 * channels
        self.gate, self.up = nn.Linear(channels, hidden), nn.Linear(channels, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, count: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        if count is None:
            place = int(torch.randint(len(self.counts), (), generator=generator)) if self.training else -1
            count = self.counts[place] if self.training else max(self.counts)
        side = _side(count)
        small = nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), side).flatten(2).mT
        return self.down(nn.functional.silu(self.gate(small)) * self.up(small))


def _side(count: int) -> int:
    side = round(count**0.5)
    if side * side != count or count < 1:
        raise ValueError(f"TokenFlex pools to square grids, got {count} tokens; take 64, 144, 256 or another square")
    return side

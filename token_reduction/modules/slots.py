"""Slot attention: slots compete for tokens, a token belongs mostly to one of them.

    A = softmax over slots of (k q^T / sqrt(D));   update = weighted mean of values;   slot = GRU(update, slot) + MLP

Source: Locatello et al., "Object-Centric Learning with Slot Attention", NeurIPS 2020, algorithm 1; Slot-MLLM's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from token_reduction.modules.local import check_rows, check_sizes, perceptron


class SlotAttention(nn.Module):
    """(B, n, C) -> (B, slots, C), and which slot each token belongs to.

    Args:
        slots: learned starting points, not drawn: the same input gives the same slots. steps: of refinement.

    >>> out, share = SlotAttention(8, slots=3)(torch.randn(2, 10, 8))
    >>> out.shape, share.shape, bool((share.sum(1) - 1).abs().max() < 1e-5)
    (torch.Size([2, 3, 8]), torch.Size([2, 3, 10]), True)
    """

    def __init__(self, channels: int, slots: int = 32, steps: int = 3) -> None:
        super().__init__()
        check_sizes(channels=channels, slots=slots, steps=steps)
        self.steps, self.scale = steps, channels**-0.5
        self.start = nn.Parameter(torch.randn(slots, channels))
        self.norm, self.norm_slots, self.norm_out = (nn.LayerNorm(channels) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.gru = nn.GRUCell(channels, channels)
        self.mlp = perceptron(channels, 2 * channels, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The slots, and (B, slots, n) shares that sum to 1 over slots."""
        check_rows(x, "B, n", self.start.shape[1], "SlotAttention")
        x = self.norm(x)
        k, v = self.k(x), self.v(x)
        slots = self.start.expand(len(x), -1, -1)
        for _ in range(self.steps):
            share = torch.softmax(self.q(self.norm_slots(slots)) @ k.mT * self.scale, 1)
            mean = (share / share.sum(-1, keepdim=True).clamp_min(1e-8)) @ v
            slots = self.gru(mean.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.mlp(self.norm_out(slots))
        return slots, share

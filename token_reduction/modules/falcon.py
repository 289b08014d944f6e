"""FALCON: learnable registers go through the encoder with the patches, and only they leave.

    layer: [registers | patches] of each crop attend to each other;
           then the registers of all crops of an image attend to each other (ReAtten)

Source: FALCON, "Resolving Visual Redundancy and Fragmentation in High-resolution MLLMs via Visual Registers"; abstract public,
layer sizes ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from token_reduction.modules.local import check_sizes


class RegisterEncoder(nn.Module):
    """(B, crops, n, C) -> (B, crops x registers, C).

    Args:
        registers: kept per crop (64 of 576 in the paper: 9 times fewer). layers, heads: of the encoder around them.

    >>> RegisterEncoder(8, registers=3, layers=1, heads=2)(torch.zeros(2, 4, 16, 8)).shape
    torch.Size([2, 12, 8])
    """

    def __init__(self, channels: int, registers: int = 64, layers: int = 2, heads: int = 8) -> None:
        super().__init__()
        check_sizes(width=channels, heads=heads, registers=registers, layers=layers)
        self.registers = nn.Parameter(torch.randn(registers, channels) / channels**0.5)
        self.inside = nn.ModuleList(_layer(channels, heads) for _ in range(layers))
        self.across = nn.ModuleList(_layer(channels, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[3] != self.registers.shape[1]:
            raise ValueError(f"registers go with (B, crops, n, {self.registers.shape[1]}), got {tuple(x.shape)}")
        b, crops, n, c = x.shape
        count = len(self.registers)
        rows = torch.cat([self.registers.expand(b * crops, -1, -1), x.reshape(b * crops, n, c)], 1)
        for inside, across in zip(self.inside, self.across, strict=True):
            rows = inside(rows)
            together = across(rows[:, :count].reshape(b, crops * count, c))
            rows = torch.cat([together.reshape(b * crops, count, c), rows[:, count:]], 1)
        return rows[:, :count].reshape(b, crops * count, c)


def _layer(channels: int, heads: int) -> nn.Module:
    return nn.TransformerEncoderLayer(channels, heads, 4 * channels, 0.0, "gelu", batch_first=True, norm_first=True)

"""M3: nested token sets by average pooling, one model for all of them.

    level c of 24 x 24: kernel = stride = sqrt(576 / c),  c = 576, 144, 36, 9, 1;   loss = mean over levels

Source: "Matryoshka Multimodal Models", section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from token_reduction.modules.local import check_map, check_sizes


class Matryoshka(nn.Module):
    """(B, h, w, C) -> one of the nested sets (B, n, C). No parameters: what is nested is learned by the model around it.

    Args:
        strides: pooling sides from fine to coarse, each a multiple of the one before.

    >>> module = Matryoshka((1, 2, 4))
    >>> [module(torch.zeros(1, 4, 4, 3), level).shape[1] for level in range(3)]
    [16, 4, 1]
    """

    def __init__(self, strides: Sequence[int] = (1, 2, 4, 8, 24)) -> None:
        super().__init__()
        check_sizes(**{f"stride {number}": side for number, side in enumerate(strides)})
        if not strides or any(wide <= side or wide % side for side, wide in pairwise(strides)):
            raise ValueError(f"strides rise, each a multiple of the one before, got {tuple(strides)}")
        self.strides = tuple(strides)

    def forward(self, x: Tensor, level: int) -> Tensor:
        if not 0 <= level < len(self.strides):
            raise ValueError(f"levels are 0 to {len(self.strides) - 1}, from fine to coarse, got {level!r}")
        side = self.strides[level]
        check_map(x, x.shape[-1], side, "Matryoshka")
        return nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), side).flatten(2).mT


def matryoshka_loss(module: Matryoshka, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over levels of `loss` of each nested set: what one training step minimises."""
    return torch.stack([loss(module(x, level)) for level in range(len(module.strides))]).mean()

"""LLaVA-SP: a few tokens that say where things are, one for each of several scales.

    crop     kernels of growing side over the centre crops of that side: from the middle to the whole
    pool     the map pooled to each side, then a kernel of that side: from the whole to detail
    each scale gives one token, which then attends to the map

Source: LLaVA-SP, "Enhancing Visual Representation with Visual Spatial Tokens for MLLMs", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from token_reduction.modules.local import check_rows, check_sizes, flat, perceptron


class SpatialTokens(nn.Module):
    """(B, h, w, C) -> (B, len(sides), width): tokens to be added to the others.

    Args:
        sides: of the kernels; 4, 8, 12, 16, 20, 24 on 24 x 24 in the paper. form: "crop" or "pool". inner: convolution width.

    >>> SpatialTokens(8, 12, sides=(2, 4), inner=6, heads=2)(torch.zeros(3, 4, 4, 8)).shape
    torch.Size([3, 2, 12])
    """

    def __init__(
        self,
        channels: int,
        width: int,
        sides: Sequence[int] = (4, 8, 12, 16, 20, 24),
        form: str = "crop",
        inner: int = 512,
        heads: int = 8,
    ) -> None:
        super().__init__()
        if not sides:
            raise ValueError("sides is empty; give the side of one kernel or more")
        check_sizes(width=channels, heads=heads, inner=inner, **{f"side {n}": side for n, side in enumerate(sides)})
        if form not in ("crop", "pool"):
            raise ValueError(f"form is crop or pool, got {form!r}")
        self.sides, self.form = tuple(sides), form
        self.scales = nn.ModuleList(nn.Conv2d(channels, inner, side) for side in self.sides)
        self.lift = nn.Linear(inner, channels)
        self.fusion = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.out = perceptron(channels, width, width)

    def forward(self, x: Tensor) -> Tensor:
        check_rows(x, "B, h, w", self.lift.out_features, "SpatialTokens")
        _, h, w, _ = x.shape
        if max(self.sides) > min(h, w):
            raise ValueError(f"kernels of side {max(self.sides)} need a map of that size, got {h} x {w}")
        map_ = x.permute(0, 3, 1, 2)
        tokens = [scale(self._part(map_, side)).flatten(1) for side, scale in zip(self.sides, self.scales, strict=True)]
        query = self.lift(torch.stack(tokens, 1))
        mixed, _ = self.fusion(query, flat(x), flat(x), need_weights=False)
        return self.out(query + mixed)

    def _part(self, map_: Tensor, side: int) -> Tensor:
        if self.form == "pool":
            return nn.functional.adaptive_avg_pool2d(map_, side)
        top, left = (map_.shape[2] - side) // 2, (map_.shape[3] - side) // 2
        return map_[:, :, top : top + side, left : left + side]

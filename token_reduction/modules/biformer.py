"""BiFormer: attention in two levels. Regions choose regions, tokens then attend inside the chosen ones.

    q_r, k_r = mean q and k of each region;   the top-k of q_r k_r^T per region
    tokens of a region attend to all tokens of its chosen regions;   + a 3 x 3 depth-wise convolution of v

Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from token_reduction.modules.local import check_map


class BiLevelRouting(nn.Module):
    """(B, h, w, C) -> (B, h, w, C); h and w are multiples of `regions`.

    Args:
        regions: regions on a side (7). chosen: regions that each region reads (1, 4, 16 or all by stage).

    >>> BiLevelRouting(8, heads=2, regions=2, chosen=3)(torch.zeros(1, 4, 6, 8)).shape
    torch.Size([1, 4, 6, 8])
    """

    def __init__(self, channels: int, heads: int = 8, regions: int = 7, chosen: int = 4) -> None:
        super().__init__()
        if channels % heads or not 1 <= chosen <= regions**2:
            raise ValueError(f"{channels} channels in {heads} heads, {chosen} of {regions**2} regions: none fits")
        self.heads, self.regions, self.chosen = heads, regions, chosen
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.near = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.out.in_features, self.regions, "BiLevelRouting")
        _, h, w, c = x.shape
        q, k, v = (self._regions(part) for part in self.qkv(x).chunk(3, -1))
        picked = (q.mean(2) @ k.mean(2).mT).topk(self.chosen, -1).indices
        k, v = (self._gather(part, picked) for part in (k, v))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(2, 3) for part in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3)
        local = self.near(self.qkv(x)[..., 2 * c :].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.out(self._join(mixed, h, w) + local)

    def _regions(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, regions^2, tokens of one, C)."""
        b, h, w, c = x.shape
        s = self.regions
        return x.view(b, s, h // s, s, w // s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, s * s, -1, c)

    def _join(self, x: Tensor, h: int, w: int) -> Tensor:
        b, s = len(x), self.regions
        return x.view(b, s, s, h // s, w // s, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)

    @staticmethod
    def _gather(x: Tensor, picked: Tensor) -> Tensor:
        """(B, R, n, C), (B, R, k) -> (B, R, k n, C): the tokens of each region's chosen regions."""
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        return x[rows, picked].flatten(2, 3)

"""GlobalCom2: the thumbnail of an any-resolution image decides how much each crop keeps.

    s_c     = the thumbnail's [CLS] scores that fall in crop c
    scale_c = min(1, R (1 + sigma_c - mean sigma)),   sigma = softmax((s - max s) / 10)
    a crop's token: own [CLS] score + the thumbnail's at its place, each L2-normalised

Source: GlobalCom2, "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution LVLMs", section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from token_reduction.batch import Batch, Selection
from token_reduction.budget import apportion
from token_reduction.exact import best_of_each, marked
from token_reduction.options import POSITIVE, Limits
from token_reduction.tokens import TokenShard
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class GlobalCom2(UnitReducer):
    """Keep k tokens of an item whose frame 0 is the thumbnail and whose other frames are its crops in raster order.

    Args:
        crops: (lines, columns) of crops. None: the squarest grid of T - 1 crops, lines <= columns.
        image: (height, width) of the picture in any unit; crop tokens that only pad it go last. None: no padding.
        temperature: of the crop shares; 10 as published.
        variant: "best" and "paper" share out exactly k. "released" rounds each crop down, as the released code does, and
            keeps fewer (`count` is an upper bound).

    Scores are those of the last encoder layer, `cls_attn`; "released" takes them before the softmax, mean over heads, from
    `cls_logits`. Scores: as above.
    """

    crops: tuple[int, int] | None = None
    image: tuple[float, float] | None = None
    temperature: float = 10.0
    limits: ClassVar[Limits] = {"temperature": POSITIVE}
    name: ClassVar[str] = "globalcom2"
    cost: ClassVar[str] = "O(n log n)"
    source: ClassVar[str] = "GlobalCom2"
    form: ClassVar[str] = "authors'"
    features: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cls_logits" if self.variant == "released" else "cls_attn"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, kind, words in (("crops", int, "(lines, columns)"), ("image", Real, "(height, width)")):
            pair = getattr(self, option)
            if pair is not None and not _is_pair(pair, kind):
                raise ValueError(f"globalcom2 got {option}={pair!r}; give {words}, both above 0, or None")

    @property
    def adaptive(self) -> bool:
        return self.variant == "released"

    def problem(self, shard: TokenShard, counts: Sequence[int]) -> str | None:
        problem = super().problem(shard, counts)
        for t, _, _ in shard.grid:
            if problem is None and t > 1 and self.crops and self.crops[0] * self.crops[1] != t - 1:
                return f"globalcom2 has crops={self.crops} but the item has {t - 1} frames after its thumbnail; they must agree"
        return problem

    def mosaic(self, crops: int) -> tuple[int, int]:
        """(lines, columns) of the crops."""
        if self.crops is not None:
            return self.crops
        lines = max((d for d in range(1, math.isqrt(crops) + 1) if crops % d == 0), default=1)
        return lines, crops // lines

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        t, h, w = batch.grid
        score = self.scores(batch).unflatten(1, (t, h * w))
        if t == 1:
            kept = marked(best_of_each(score[:, 0], [count] * len(score)))
            return [Selection(k, scores=s[0]) for k, s in zip(kept, score)]
        lines, columns = self.mosaic(t - 1)
        thumb = score[:, :1].unflatten(2, (h, w))
        wide = interpolate(thumb, (lines * h, columns * w), mode="bilinear", align_corners=False)[:, 0]
        global_ = _tiles(wide, lines, columns)
        real = _tiles(self.unpadded(lines * h, columns * w).to(wide.device)[None], lines, columns)[0]
        both = _unit(score[:, 1:]) + global_ / global_.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None]
        both = torch.where(real, both, both - 4.0)
        shares = torch.tensor(self.shares(global_ * real, real, count, h * w))
        parts = torch.cat([score[:, :1], both], 1)
        kept = marked(best_of_each(parts, shares).flatten(1))
        return [Selection(k, scores=s.flatten()) for k, s in zip(kept, parts)]

    def scores(self, batch: Batch) -> Tensor:
        """(B, n) float64."""
        if self.variant != "released":
            return batch.attention()
        return batch.heads("cls_logits").mean(-1)

    def shares(self, falling: Tensor, real: Tensor, count: int, cells: int) -> list[list[int]]:
        """Tokens of the thumbnail and of each crop, for each unit: falling (B, crops, cells), real (crops, cells) bool."""
        crops, total = len(real), falling.sum(2)
        ratio = count / (cells * (crops + 1))
        sigma = torch.softmax((total - total.amax(1, keepdim=True)) / self.temperature, 1)
        scale = (ratio * (1 + sigma - sigma.mean(1, keepdim=True))).clamp(max=1.0)
        thumb, usable = max(1, int(cells * ratio)), real.sum(1)
        if self.variant == "released":
            return [[thumb, *own] for own in (usable * scale).int().tolist()]
        caps = usable.tolist() if int(usable.sum()) >= count - thumb else [cells] * crops
        return [[thumb, *apportion(count - thumb, own, caps)] for own in (usable * scale).tolist()]

    def unpadded(self, height: int, width: int) -> Tensor:
        """(height, width) bool: places of the mosaic that show the picture, not its padding."""
        inside = torch.ones(height, width, dtype=torch.bool)
        if self.image is None:
            return inside
        tall, broad = self.image
        if broad / tall > width / height:
            pad = (height - int(tall * width / broad)) // 2
            inside[:pad], inside[height - pad :] = False, False
        else:
            pad = (width - int(broad * height / tall)) // 2
            inside[:, :pad], inside[:, width - pad :] = False, False
        return inside


def _tiles(mosaic: Tensor, lines: int, columns: int) -> Tensor:
    """(B, lines h, columns w) -> (B, crops, h w)."""
    b, h, w = len(mosaic), mosaic.shape[1] // lines, mosaic.shape[2] // columns
    return mosaic.view(b, lines, h, columns, w).permute(0, 1, 3, 2, 4).reshape(b, lines * columns, h * w)


def _is_pair(pair: Any, kind: type) -> bool:
    """Two finite numbers above 0."""
    return (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and all(isinstance(x, kind) and 0 < x < math.inf for x in pair)
    )


def _unit(score: Tensor) -> Tensor:
    return score / score.norm(dim=-1, keepdim=True).clamp_min(1e-30)

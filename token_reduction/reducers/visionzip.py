"""VisionZip, and VisionDrop's stage in the encoder: dominant tokens stay, the others gather at evenly spaced targets.

    dominant    the k - c tokens with the largest [CLS] attention
    contextual  c targets evenly spaced over the rest; each other token joins the target with the nearest key

Source: VisionZip, "Longer is Better but Not Necessary in Vision Language Models" (CVPR 2025); VisionDrop, stage 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.exact import nearest, rest, rows_at, top
from token_reduction.options import Limits, Range
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class VisionZip(UnitReducer):
    """Keep k rows of each frame: (1 - contextual) k dominant tokens, the others merged. Keys are averaged over heads where
    these are told apart.

    Args:
        contextual: share of the k rows that are merged, at least one of them where k > 1.
        variant: "best" and "paper" average a target with its tokens. "released" does as the released code, which adds the
            mean of the tokens to the target, so that such a row of W sums to 2.

    Scores: [CLS] attention.
    """

    contextual: float = 10 / 64
    limits: ClassVar[Limits] = {"contextual": Range(0, 1, open=True)}
    name: ClassVar[str] = "visionzip"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attn", "keys"})
    cost: ClassVar[str] = "O(k n D)"
    source: ClassVar[str] = "VisionZip"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "authors'"
    scope: ClassVar[str] = "frame"

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        attention, keys = batch.attention(), batch.units("keys", mean_heads=True)
        merged, n = min(count - 1, max(1, round(self.contextual * count))), attention.shape[1]
        dominant = top(attention, count - merged)
        others = rest(n, dominant)
        at = torch.arange(merged, device=others.device) * (others.shape[1] // max(1, merged))
        targets = others[:, at]
        kept = torch.cat([dominant, targets], 1).sort().values
        row = torch.full_like(attention, -1, dtype=torch.int64)
        row.scatter_(1, dominant, torch.searchsorted(kept, dominant.contiguous()))
        if merged:
            place = nearest(rows_at(keys, others), rows_at(keys, targets))
            place[:, at] = torch.arange(merged, device=others.device)
            row.scatter_(1, others, torch.searchsorted(kept, targets).gather(1, place))
        return [self.rows(*parts) for parts in zip(kept, row, attention)]

    def rows(self, kept: Tensor, row: Tensor, attention: Tensor) -> Selection:
        """Each token in the row of its number, those at -1 in none; means, or as the released code adds."""
        if self.variant != "released":
            return Selection.groups(kept, row, attention)
        sources = (row >= 0).nonzero()[:, 0]
        rows = row[sources]
        joined = torch.bincount(rows, minlength=kept.numel()) - 1
        weight = torch.where(kept[rows] == sources, 1.0, 1.0 / joined[rows].clamp_min(1).double())
        return Selection.merge(kept, rows, sources, weight, attention)


@dataclass(frozen=True, kw_only=True)
class VisionDrop(VisionZip):
    """VisionDrop's stage 0: `VisionZip` with 42 dominant tokens to 6 merged ones. Its stages in the model are a layer policy."""

    contextual: float = 6 / 48
    name: ClassVar[str] = "visiondrop"
    source: ClassVar[str] = "VisionDrop, stage 0"

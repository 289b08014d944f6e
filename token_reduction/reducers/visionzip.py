"""VisionZip, and VisionDrop's stage in the encoder: dominant tokens stay, the others gather at evenly spaced targets.

    dominant    the k - c tokens with the largest [CLS] attention
    contextual  c targets evenly spaced over the rest; each other token joins the target with the nearest key

Source: VisionZip, "Longer is Better but Not Necessary in Vision Language Models" (CVPR 2025); VisionDrop, stage 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from token_reduction.batch import Batch, Selection
from token_reduction.exact import nearest, rest, top
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
    name: ClassVar[str] = "visionzip"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attn", "keys"})
    cost: ClassVar[str] = "O(k n D)"
    source: ClassVar[str] = "VisionZip"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "authors'"
    scope: ClassVar[str] = "frame"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.contextual < 1:
            raise ValueError(f"contextual is a share between 0 and 1, got {self.contextual!r}; 10/64 is published")

    def select_one(self, batch: Batch, count: int) -> Selection:
        attention, keys = batch.attention()[0], batch.units("keys", mean_heads=True)[0]
        merged = min(count - 1, max(1, round(self.contextual * count)))
        dominant = top(attention, count - merged)
        if not merged:
            return Selection(dominant, scores=attention)
        others = rest(len(keys), dominant)
        targets = others[:: len(others) // merged][:merged].contiguous()
        kept = torch.cat([dominant, targets]).sort().values
        row = torch.searchsorted(kept, targets[nearest(keys[others], keys[targets])])
        row[torch.searchsorted(others, targets)] = torch.searchsorted(kept, targets)
        alone = torch.arange(count, device=kept.device)[~torch.isin(kept, targets)]
        rows, sources = torch.cat([alone, row]), torch.cat([kept[alone], others])
        return Selection.merge(kept, rows, sources, self.weights(rows, sources, kept), attention)

    def weights(self, rows: torch.Tensor, sources: torch.Tensor, kept: torch.Tensor) -> torch.Tensor | None:
        """Weight of each entry, None for plain means."""
        if self.variant != "released":
            return None
        joined = torch.bincount(rows, minlength=kept.numel()) - 1
        return torch.where(kept[rows] == sources, 1.0, 1.0 / joined[rows].clamp_min(1).double())


@dataclass(frozen=True, kw_only=True)
class VisionDrop(VisionZip):
    """VisionDrop's stage 0: `VisionZip` with 42 dominant tokens to 6 merged ones. Its stages in the model are a layer policy."""

    contextual: float = 6 / 48
    name: ClassVar[str] = "visiondrop"
    source: ClassVar[str] = "VisionDrop, stage 0"

"""AIM stage 1: halve a frame again and again by joining its most alike tokens.

    round: A = even rows, B = odd rows; the r closest pairs become the mean of their rows, until k are left

Source: AIM, "Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning" (ICCV 2025), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from token_reduction.batch import Batch, Selection
from token_reduction.selectors.pairs import merge_rounds
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class Aim(UnitReducer):
    """Keep k rows of each frame by bipartite merging of features; a merged row is the plain mean of its rows.

    A quarter of the tokens takes two rounds (n/2, then n/4), as published; other counts take as many as they need.

    Variants: "best" and "paper" keep rows in raster order between rounds. "released" lists the rows that did not join by
    falling similarity, then those of B, so that the next round splits them differently. Scores: none.
    """

    name: ClassVar[str] = "aim"
    cost: ClassVar[str] = "O(T N^2 D)"
    source: ClassVar[str] = "AIM, stage 1"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "authors'"
    scope: ClassVar[str] = "frame"

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        merged = merge_rounds(batch.x, count, sized=False, best_first=self.variant == "released")
        return [rows_of(*parts) for parts in zip(*merged)]


def rows_of(anchor: torch.Tensor, group: torch.Tensor, weight: torch.Tensor) -> Selection:
    """The answer of one unit: rows in order of their anchors."""
    kept, order = anchor.sort()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    tokens = torch.arange(len(group), device=group.device)
    return Selection.merge(kept, place[group], tokens, weight)

"""HiPrune: anchors of a middle layer, their neighbours, and registers of a deep layer.

    anchors    the round(k alpha / 5) tokens that receive most attention in the object layer
    buffers    the anchors' four neighbours
    registers  the tokens that receive most attention in the deep layer, until k

Source: HiPrune, "Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models", section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.exact import best_of_each, marked, top
from token_reduction.options import Limits, Range
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class HiPrune(UnitReducer):
    """Keep k tokens of each frame. `recv_attn` (n, 2): received attention of the object layer, then of the deep layer.

    Args:
        alpha: share of k for anchors and buffers; up to 5, where all k are anchors.
        variant: "best" and "paper" leave out neighbours beyond the frame's edge. "released" takes the token numbers +-1 and
            +-w clamped to the frame, so that a neighbour may lie at the other end of the next line.

    Scores: of the deep layer.
    """

    alpha: float = 0.1
    limits: ClassVar[Limits] = {"alpha": Range(0, 5)}
    name: ClassVar[str] = "hiprune"
    needs: ClassVar[frozenset[str]] = frozenset({"recv_attn"})
    cost: ClassVar[str] = "O(n log n)"
    source: ClassVar[str] = "HiPrune"
    form: ClassVar[str] = "authors'"
    scope: ClassVar[str] = "frame"
    features: ClassVar[bool] = False

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        middle, deep = batch.attention("recv_attn", 0), batch.attention("recv_attn", -1)
        anchors = top(middle, min(count, round(count * self.alpha / 5)))
        taken = torch.zeros_like(middle, dtype=torch.bool).scatter_(1, anchors, True)
        near = self.neighbours(anchors, batch.grid) & ~taken
        taken |= _first(middle, near, near.sum(1).clamp(max=count - anchors.shape[1]))
        taken |= _first(deep, ~taken, count - taken.sum(1))
        return [Selection(kept, scores=score) for kept, score in zip(marked(taken), deep)]

    def neighbours(self, anchors: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, n) bool: the anchors' (B, m) four neighbours."""
        _, h, w = grid
        mask = torch.zeros(len(anchors), h * w, dtype=torch.bool, device=anchors.device)
        if self.variant == "released":
            steps = torch.tensor([-w, -1, 1, w], device=anchors.device)
            return mask.scatter_(1, (anchors[..., None] + steps).clamp(0, h * w - 1).flatten(1), True)
        for lines, columns in ((-1, 0), (0, -1), (0, 1), (1, 0)):
            line, column = anchors // w + lines, anchors % w + columns
            inside = (line >= 0) & (line < h) & (column >= 0) & (column < w)
            unit, place = inside.nonzero(as_tuple=True)
            mask[unit, (line * w + column)[unit, place]] = True
        return mask


def _first(score: Tensor, among: Tensor, counts: Tensor) -> Tensor:
    """(B, n) bool: of each line the `counts` (B,) best of those `among`."""
    return best_of_each(score.masked_fill(~among, -torch.inf), counts)

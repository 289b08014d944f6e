"""HiPrune: anchors of a middle layer, their neighbours, and registers of a deep layer.

    anchors    the round(k alpha / 5) tokens that receive most attention in the object layer
    buffers    the anchors' four neighbours
    registers  the tokens that receive most attention in the deep layer, until k

Source: HiPrune, "Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models", section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.exact import top
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class HiPrune(UnitReducer):
    """Keep k tokens of each frame. `recv_attn` (n, 2): received attention of the object layer, then of the deep layer.

    Args:
        alpha: share of k for anchors and buffers.
        variant: "best" and "paper" leave out neighbours beyond the frame's edge. "released" takes the token numbers +-1 and
            +-w clamped to the frame, so that a neighbour may lie at the other end of the next line.

    Scores: of the deep layer.
    """

    alpha: float = 0.1
    name: ClassVar[str] = "hiprune"
    needs: ClassVar[frozenset[str]] = frozenset({"recv_attn"})
    cost: ClassVar[str] = "O(n log n)"
    source: ClassVar[str] = "HiPrune"
    form: ClassVar[str] = "authors'"
    scope: ClassVar[str] = "frame"
    features: ClassVar[bool] = False

    def select_one(self, batch: Batch, count: int) -> Selection:
        middle, deep = batch.attention("recv_attn", 0)[0], batch.attention("recv_attn", -1)[0]
        anchors = top(middle, min(count, round(count * self.alpha / 5)))
        near = self.neighbours(anchors, batch.grid)
        near = near[~torch.isin(near, anchors)]
        taken = torch.cat([anchors, near[top(middle[near], count - len(anchors))]])
        left = deep.clone()
        left[taken] = -torch.inf
        kept = torch.cat([taken, top(left, count - len(taken))])
        return Selection(kept.sort().values, scores=deep)

    def neighbours(self, anchors: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """The anchors' four neighbours, each once, ascending."""
        _, h, w = grid
        if self.variant == "released":
            steps = torch.tensor([-w, -1, 1, w], device=anchors.device)
            return (anchors[:, None] + steps).clamp(0, h * w - 1).unique()
        steps = torch.tensor([[-1, 0], [0, -1], [0, 1], [1, 0]], device=anchors.device)
        line = (anchors // w)[:, None] + steps[:, 0]
        column = (anchors % w)[:, None] + steps[:, 1]
        inside = (line >= 0) & (line < h) & (column >= 0) & (column < w)
        return (line * w + column)[inside].unique()

"""VisPruner: half the tokens by attention, half by dropping near-duplicates.

    important  the tokens with the largest [CLS] attention
    diverse    the rest, in rounds: even rows against odd rows, the r even rows most like an odd one go

Source: VisPruner, "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs" (ICCV 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from token_reduction.batch import Batch, Selection
from token_reduction.exact import rest, rows_at, top
from token_reduction.options import COUNT, SHARE, Limits
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class VisPruner(UnitReducer):
    """Keep k tokens of each frame.

    Args:
        important: share chosen by attention.
        per_round: near-duplicates dropped in one round.

    Scores: [CLS] attention. Variants: one algorithm; best, paper and released are the same.
    """

    important: float = 0.5
    per_round: int = 8
    limits: ClassVar[Limits] = {"important": SHARE, "per_round": COUNT}
    name: ClassVar[str] = "vispruner"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attn"})
    cost: ClassVar[str] = "O(T N^3 D / r)"
    source: ClassVar[str] = "VisPruner"
    form: ClassVar[str] = "authors'"
    scope: ClassVar[str] = "frame"

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        attention, q = batch.attention(), batch.units()
        first = top(attention, round(self.important * count))
        left, goal = rest(q.shape[1], first), count - first.shape[1]
        alike = q @ q.mT
        while goal and left.shape[1] > goal:
            even, odd = left[:, ::2], left[:, 1::2]
            score = rows_at(alike, even).gather(2, odd[:, None].expand(-1, even.shape[1], -1)).amax(-1)
            gone = 2 * top(score, min(self.per_round, left.shape[1] - goal, left.shape[1] // 2))
            left = left.gather(1, rest(left.shape[1], gone))
        kept = torch.cat([first, left[:, :goal]], 1).sort().values
        return [Selection(k, scores=score) for k, score in zip(kept, attention)]

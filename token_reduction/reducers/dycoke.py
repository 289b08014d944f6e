"""DyCoke: in each run of four frames, later frames give up what an earlier one shows already.

    frame 1 against 0,  3 against 2,  then 2 against 0:   the cells with the largest cosine go

Source: DyCoke, "Dynamic Compression of Tokens for Fast Video Large Language Models" (CVPR 2025), temporal merging.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from token_reduction.batch import Batch, Selection
from token_reduction.exact import best_of_each, marked, spread
from token_reduction.unit_reducer import UnitReducer

_BACK = (4, 1, 2, 1)


@dataclass(frozen=True, kw_only=True)
class DyCoke(UnitReducer):
    """Keep exactly k tokens of each video: the first frame of each run of four whole, the others' most changed cells.

    With less than a quarter of the tokens the first frames pay too, by their change since the run before. The published
    setting drops 70% of the other frames' cells, which keeps 47.5% in all.

    Scores: 1 - cosine to the frame compared with; 2 in frame 0. Variants: one algorithm; best, paper, released are the same.
    """

    name: ClassVar[str] = "dycoke"
    cost: ClassVar[str] = "O(n D)"
    source: ClassVar[str] = "DyCoke, temporal token merging"
    form: ClassVar[str] = "authors'"

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        t, h, w = batch.grid
        q = batch.units().unflatten(1, (t, h * w))
        change = q.new_full(q.shape[:3], 2.0)
        for frame in range(1, t):
            before = frame - _BACK[frame % 4]
            change[:, frame] = 1 - (q[:, frame] * q[:, before]).sum(-1)
        kept = marked(best_of_each(change, self.shares(t, h * w, count)).flatten(1))
        return [Selection(k, scores=score.flatten()) for k, score in zip(kept, change)]

    @staticmethod
    def shares(frames: int, cells: int, count: int) -> list[int]:
        """Tokens of each frame."""
        first, others = -(-frames // 4), frames - -(-frames // 4)
        whole = min(count, first * cells)
        leading, following = iter(spread(whole, first)), iter(spread(count - whole, others) if others else [])
        return [next(following if frame % 4 else leading) for frame in range(frames)]

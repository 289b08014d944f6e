"""DyCoke: in each run of four frames, later frames give up what an earlier one shows already.

    frame 1 against 0,  3 against 2,  then 2 against 0:   the cells with the largest cosine go

Source: DyCoke, "Dynamic Compression of Tokens for Fast Video Large Language Models" (CVPR 2025), temporal merging.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from token_reduction.batch import Batch, Selection
from token_reduction.exact import spread, top
from token_reduction.unit_reducer import UnitReducer


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

    def select_one(self, batch: Batch, count: int) -> Selection:
        t, h, w = batch.grid
        cells = h * w
        q = batch.units()[0].view(t, cells, -1)
        change = q.new_full((t, cells), 2.0)
        back = [0, 1, 2, 1]
        for frame in range(1, t):
            before = frame - (back[frame % 4] or 4)
            change[frame] = 1 - (q[frame] * q[before]).sum(-1)
        first = list(range(0, t, 4))
        others = [frame for frame in range(t) if frame % 4]
        whole = min(count, len(first) * cells)
        shares = dict(zip(first, spread(whole, len(first))))
        shares |= dict(zip(others, spread(count - whole, len(others)))) if others else {}
        kept = [frame * cells + top(change[frame], share) for frame, share in shares.items()]
        return Selection(torch.cat(kept).sort().values, scores=change.flatten())

"""DiffFP: tokens whose pixels changed since the previous frame (VideoLLaMA 3's differential frame pruner).

    s(t, c) = 255 mean |p[t, c] - p[t-1, c]|,   frame 0 always;   keep the largest s

Source: VideoLLaMA 3, "Frontier Multimodal Foundation Models for Image and Video Understanding", section on video compression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from token_reduction.batch import Batch, Selection
from token_reduction.exact import top
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class DiffFP(UnitReducer):
    """Keep the tokens of a video whose pixels changed most. `pixels` (N, ...) in 0..1, one patch per token.

    Args:
        threshold: change, in 0..255, that "paper" and "released" ask for.
        variant: "best" keeps exactly k, frame 0 first. "paper" and "released" keep what changed by more than `threshold`, at
            least one token per frame, and at most k (`count` is an upper bound; the least changed go first).

    Scores: s, 255 in frame 0.
    """

    threshold: float = 0.1
    name: ClassVar[str] = "difffp"
    needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
    cost: ClassVar[str] = "O(n P), P pixels per token"
    source: ClassVar[str] = "VideoLLaMA 3, differential frame pruner"
    form: ClassVar[str] = "authors'"
    features: ClassVar[bool] = False

    @property
    def idle(self) -> dict[str, str]:
        return {"threshold": "variant='best'"} if self.variant == "best" else {}

    @property
    def adaptive(self) -> bool:
        return self.variant != "best"

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        t, h, w = batch.grid
        pixels = batch.channels["pixels"].double().reshape(len(batch.x), t, h * w, -1)
        score = pixels.new_full(pixels.shape[:3], 255.0)
        score[:, 1:] = 255.0 * (pixels[:, 1:] - pixels[:, :-1]).abs().mean(-1)
        if not self.adaptive:
            kept = top(score.flatten(1), count).sort(-1).values
            return [Selection(k, scores=s.flatten()) for k, s in zip(kept, score)]
        most = score.argmax(2, keepdim=True)
        keep = (score > self.threshold).scatter(2, most, True)
        ranked = torch.where(keep, score, -1.0)
        # A frame's own best token comes before others' second best, so that no frame is left empty while k lasts.
        ranked.scatter_add_(2, most, torch.full_like(most, 512, dtype=ranked.dtype))
        order, counts = top(ranked.flatten(1), count), keep.sum((1, 2)).tolist()
        return [Selection(o[:c].sort().values, scores=s.flatten()) for o, c, s in zip(order, counts, score)]

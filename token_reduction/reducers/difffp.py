"""DiffFP: tokens whose pixels changed since the previous frame (VideoLLaMA 3's differential frame pruner).

    s(t, c) = 255 mean |p[t, c] - p[t-1, c]|,   frame 0 always;   keep the largest s

Source: VideoLLaMA 3, "Frontier Multimodal Foundation Models for Image and Video Understanding", section on video compression.
"""

from __future__ import annotations

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
    def adaptive(self) -> bool:
        return self.variant != "best"

    def select_one(self, batch: Batch, count: int) -> Selection:
        t, h, w = batch.grid
        pixels = batch.channels["pixels"][0].double().reshape(t, h * w, -1)
        score = pixels.new_full((t, h * w), 255.0)
        score[1:] = 255.0 * (pixels[1:] - pixels[:-1]).abs().mean(-1)
        if self.adaptive:
            keep = score > self.threshold
            keep[torch.arange(t), score.argmax(1)] = True
            count = min(count, int(keep.sum()))
            ranked = torch.where(keep, score, -1.0)
            # A frame's own best token comes before others' second best, so that no frame is left empty while k lasts.
            ranked[torch.arange(t), score.argmax(1)] += 512.0
            return Selection(top(ranked.flatten(), count).sort().values, scores=score.flatten())
        return Selection(top(score.flatten(), count).sort().values, scores=score.flatten())

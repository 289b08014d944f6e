"""Image-text interaction: cut the falling curve of [CLS] scores where it bends, then prefer what the text asks for.

    stage 1   sort s_j; keep the tokens before the knee
    stage 2   among them, the tokens with the largest mean cosine to the text (in the model: a layer policy)

Source: token pruning by image-text interaction; the abstract is public, the details of both stages are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from token_reduction.batch import Batch, Selection
from token_reduction.exact import best_of_each, knee, marked, top, unit_rows
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class ImageText(UnitReducer):
    """Keep k tokens of each frame.

    Args:
        use_text: rank the tokens before the knee by the text instead of by [CLS]; needs `text` in the space of x.
        variant: "best" keeps exactly k: of the tokens before the knee (k at least) the best. "paper" and "released" keep the
            tokens before the knee, k at most (`count` is an upper bound).

    Scores: [CLS] attention.
    """

    use_text: bool = False
    name: ClassVar[str] = "image_text"
    cost: ClassVar[str] = "O(n (log n + D))"
    source: ClassVar[str] = "image-text interaction token pruning"
    form: ClassVar[str] = "ours"
    scope: ClassVar[str] = "frame"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cls_attn", "text"}) if self.use_text else frozenset({"cls_attn"})

    @property
    def adaptive(self) -> bool:
        return self.variant != "best"

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        if self.use_text and len({id(text) for text in batch.texts}) > 1:
            return batch.by_text(lambda part: self.select(part, count))
        attention = batch.attention()
        order = top(attention, attention.shape[1])
        before = knee(attention.gather(1, order))
        counts = before.clamp(max=count) if self.adaptive else torch.full_like(before, count)
        score = attention
        if self.use_text:
            pool = best_of_each(attention, torch.maximum(before, counts))
            asked = (batch.units() @ unit_rows(batch.text).mT).mean(-1)
            score = asked.masked_fill(~pool, -torch.inf)
        return [Selection(k, scores=own) for k, own in zip(marked(best_of_each(score, counts)), attention)]

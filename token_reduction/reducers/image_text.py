"""Image-text interaction: cut the falling curve of [CLS] scores where it bends, then prefer what the text asks for.

    stage 1   sort s_j; keep the tokens before the knee
    stage 2   among them, the tokens with the largest mean cosine to the text (in the model: a layer policy)

Source: token pruning by image-text interaction; the abstract is public, the details of both stages are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from token_reduction.batch import Batch, Selection
from token_reduction.exact import knee, top, unit_rows
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

    def select_one(self, batch: Batch, count: int) -> Selection:
        attention = batch.attention()[0]
        order = top(attention, len(attention))
        before = knee(attention[order])
        count = min(count, before) if self.adaptive else count
        pool = order[: max(before, count)]
        if self.use_text:
            pool = pool.sort().values
            asked = (batch.units()[0][pool] @ unit_rows(batch.text.to(pool.device)).mT).mean(1)
            pool = pool[top(asked, count)]
        return Selection(pool[:count].sort().values, scores=attention)

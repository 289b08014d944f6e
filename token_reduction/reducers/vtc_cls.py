"""VTC-CLS: keep the tokens that [CLS] attends to, summed over the late layers of the encoder.

    s_j = sum_l A_l[cls, j],   keep the k largest

With one layer in the channel this is FasterVLM. An encoder without [CLS] gives its received attention instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from token_reduction.batch import Batch, Selection
from token_reduction.exact import top
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class VtcCls(UnitReducer):
    """Keep the k tokens with the largest [CLS] attention, summed over the columns of `cls_attn`.

    Give the layers that the published method sums (from a start layer to the last but one) as columns. Scores: the sum.
    Variants: one algorithm; best, paper and released are the same.
    """

    name: ClassVar[str] = "vtc_cls"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attn"})
    cost: ClassVar[str] = "O(n log n)"
    source: ClassVar[str] = "VTC-CLS, visual token compression by [CLS] attention; FasterVLM is its one-layer case"
    form: ClassVar[str] = "authors'"
    flat: ClassVar[bool] = True
    features: ClassVar[bool] = False

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        value = batch.channels["cls_attn"].double()
        score = value if value.dim() == 2 else value.sum(-1)
        kept = top(score, count).sort(-1).values
        return [Selection(k, scores=s) for k, s in zip(kept, score)]

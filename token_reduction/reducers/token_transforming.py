"""Token Transforming: every kept token draws from all tokens (many to many).

    X' = W X,   W_ij ~ exp(tau cos(x_i, x_j)),   kept i by attention, rows of W sum to 1

Pruning, merging and this are the same object, a matrix W; so says the paper. Its own weights are not public: ours.
Source: "Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer Acceleration".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from token_reduction.batch import Batch, Selection
from token_reduction.exact import rows_at, top
from token_reduction.options import COUNT, Limits, Range
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class TokenTransforming(UnitReducer):
    """Keep k rows of each frame, each a weighted mean of the tokens most like it.

    Args:
        temperature: tau above; large values come near pruning.
        sources: most tokens that a row draws from, its own among them.

    Scores: [CLS] attention. Variants: one algorithm; best, paper and released are the same.
    """

    temperature: float = 10.0
    sources: int = 32
    limits: ClassVar[Limits] = {"temperature": Range(0), "sources": COUNT}
    name: ClassVar[str] = "token_transforming"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attn"})
    cost: ClassVar[str] = "O(k n D)"
    source: ClassVar[str] = "Token Transforming (many-to-many token aggregation)"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "ours"
    scope: ClassVar[str] = "frame"

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        attention, q = batch.attention(), batch.units()
        kept = top(attention, count).sort().values
        cosine = rows_at(q, kept) @ q.mT
        cosine.scatter_(2, kept[..., None], 2.0)  # a row always draws from its own token, duplicates or not
        near = top(cosine, min(self.sources, q.shape[1]))
        logits = cosine.gather(2, near).clamp(max=1.0) * self.temperature
        weight = torch.softmax(logits, -1)
        row = torch.arange(count, device=kept.device)[:, None].expand_as(near[0]).reshape(-1)
        return [
            Selection.merge(k, row, source.reshape(-1), share.reshape(-1), score)
            for k, source, share, score in zip(kept, near, weight, attention)
        ]

"""CATP stage 1: image tokens of an interleaved prompt that cover their image and fit the text beside it.

    maximise  sum_x max_{y in Y} s(x, y) + lambda sum_{y in Y} s(y, v),   s = (1 + cosine) / 2,  v = mean of the text

Source: CATP, contextually adaptive token pruning for multimodal in-context learning (AAAI 2026), stage 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from token_reduction.batch import Batch, Selection
from token_reduction.exact import fixed_mean, unit_rows
from token_reduction.selectors.coverage import Cover, cosines, greedy
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class Catp(UnitReducer):
    """Keep k tokens of each item; `text` is the item's own text: give a list with one (m, D) for each.

    The published stage keeps n (1 - R/2) for an overall pruning rate R, the second stage (in the model) takes the rest.

    Args:
        weight: lambda.

    Scores: the gain of a kept token, 0 for the others. Variants: one algorithm; best, paper and released are the same.
    """

    weight: float = 0.7
    name: ClassVar[str] = "catp"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    cost: ClassVar[str] = "O(n^2 D) time, O(n D) memory"
    source: ClassVar[str] = "CATP, stage 1"
    form: ClassVar[str] = "authors'"
    flat: ClassVar[bool] = True

    def work(self, item: tuple[int, int, int], count: int, width: int) -> float:
        return float(item[0] * item[1] * item[2]) ** 2 * width

    def select_one(self, batch: Batch, count: int) -> Selection:
        q = batch.units()[0]
        mean = unit_rows(fixed_mean(batch.text.to(q.device))[None])[0]
        bonus = self.weight * (q @ mean * 0.5 + 0.5)
        order, gains = greedy(Cover(cosines(q, low=0.0), bonus, 0.0), count)
        return Selection(order.sort().values, scores=torch.zeros_like(bonus).index_put_((order,), gains))

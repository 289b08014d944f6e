"""CATP stage 1: image tokens of an interleaved prompt that cover their image and fit the text beside it.

    maximise  sum_x max_{y in Y} s(x, y) + lambda sum_{y in Y} s(y, v),   s = (1 + cosine) / 2,  v = mean of the text

Source: CATP, contextually adaptive token pruning for multimodal in-context learning (AAAI 2026), stage 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from token_reduction.batch import Batch, Selection
from token_reduction.exact import fixed_mean, unit_rows
from token_reduction.options import Limits, Range
from token_reduction.reducers.facility import chosen
from token_reduction.selectors.cover import Cover, cosines, fits
from token_reduction.selectors.coverage import greedy
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
    limits: ClassVar[Limits] = {"weight": Range(0)}
    name: ClassVar[str] = "catp"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    cost: ClassVar[str] = "O(n^2 D) time, O(n D) memory"
    source: ClassVar[str] = "CATP, stage 1"
    form: ClassVar[str] = "authors'"
    flat: ClassVar[bool] = True

    def work(self, item: tuple[int, int, int], count: int, width: int) -> float:
        return float(item[0] * item[1] * item[2]) ** 2 * width

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        if len(batch.x) > 1 and not fits(batch.x.shape[1]):
            return batch.one_by_one(lambda one: self.select(one, count))
        q = batch.units()
        mean = unit_rows(torch.stack([fixed_mean(text.to(q.device)) for text in batch.texts])[:, None])
        bonus = self.weight * ((q @ mean.mT)[..., 0] * 0.5 + 0.5)
        cover = Cover(cosines(q, low=0.0), bonus, 0.0)
        return chosen(*greedy(cover, count), cover)

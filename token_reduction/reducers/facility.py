"""Facility location: the tokens that leave every token a near kept one. The plain coverage that several methods build on.

F(Y) = sum_i max_{y in Y} cos(x_i, y),   grown greedily: within 1 - 1/e of the best of its size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.options import Limits, Range
from token_reduction.selectors.cover import Cover, cosines, fits
from token_reduction.selectors.coverage import drawn, greedy
from token_reduction.unit_reducer import UnitReducer

_SAMPLERS = ("exact", "stochastic")


@dataclass(frozen=True, kw_only=True)
class Facility(UnitReducer):
    """Keep k tokens of each item by greedy facility location over cosines.

    Args:
        sampler: "exact" takes what greedy takes; "stochastic" looks at (n/k) ln(1/accuracy) drawn candidates a step.
        accuracy: of the stochastic sampler.
        center: take the item's mean off every token before the cosine.

    The matrix of cosines is held while it is at most 256 MiB; beyond that columns are made when asked for, in O(n D) memory.
    Scores: the gain of a kept token when it was chosen, 0 for the others. Variants: one algorithm, all the same.
    """

    sampler: str = "exact"
    accuracy: float = 0.1
    center: bool = False
    limits: ClassVar[Limits] = {"sampler": _SAMPLERS, "accuracy": Range(0, 1, open=True)}
    name: ClassVar[str] = "facility"
    cost: ClassVar[str] = "O(n^2 D) time, O(n D) memory"
    source: ClassVar[str] = (
        "facility location; lazy greedy of Minoux 1978, stochastic greedy of Mirzasoleiman et al. 2015"
    )
    form: ClassVar[str] = "authors'"
    flat: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    @property
    def idle(self) -> dict[str, str]:
        return {"accuracy": "sampler='exact'"} if self.sampler == "exact" else {}

    def work(self, item: tuple[int, int, int], count: int, width: int) -> float:
        return float(item[0] * item[1] * item[2]) ** 2 * width

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        stochastic = self.sampler == "stochastic"
        if len(batch.x) > 1 and (stochastic or not fits(batch.x.shape[1])):
            return batch.one_by_one(lambda one: self.select(one, count))
        q = batch.units(center=self.center)
        cover = Cover(cosines(q), q.new_zeros(q.shape[:2]), -1.0)
        return chosen(
            *(drawn(cover, count, batch.generator(0), self.accuracy) if stochastic else greedy(cover, count)), cover
        )


def chosen(order: Tensor, gains: Tensor, cover: Cover) -> list[Selection]:
    """The units' answers from the order of choice and the gains, (B, count); scores are the gains."""
    scores = torch.zeros_like(cover.bonus).scatter_(1, order, gains)
    return [Selection(kept, scores=score) for kept, score in zip(order.sort(-1).values, scores)]

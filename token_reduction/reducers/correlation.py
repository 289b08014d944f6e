"""Token-level correlation: how many tokens of a picture are unlike all others says how many it deserves.

    density = share of tokens i with max_{j < i or j kept so far} cos(x_i, x_j) < tau
    sampled by [CLS] attention, half from a shallow and half from a deep layer

Source: token-level correlation-guided compression for document understanding; abstract public, the form is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.exact import top
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class Correlation(UnitReducer):
    """Keep k tokens of each frame. `cls_attn` (n, 2): a shallow layer, then a deep one; one column serves as both.

    Args:
        tau: cosine above which a token repeats another.
        variant: "best" takes the most attended tokens of the two layers by turns, exactly k. "paper" and "released" let the
            picture's own density set the count, k at most (`count` is an upper bound), and draw tokens in proportion.

    Scores: mean attention of the two layers.
    """

    tau: float = 0.9
    name: ClassVar[str] = "correlation"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attn"})
    cost: ClassVar[str] = "O(T N^2 D)"
    source: ClassVar[str] = "token-level correlation-guided compression"
    form: ClassVar[str] = "ours"
    scope: ClassVar[str] = "frame"
    draws: ClassVar[bool] = True

    @property
    def adaptive(self) -> bool:
        return self.variant != "best"

    def select_one(self, batch: Batch, count: int) -> Selection:
        shallow, deep = batch.attention(layer=0)[0], batch.attention(layer=-1)[0]
        chance = None
        if self.adaptive:
            count = min(count, math.ceil(self.density(batch.units()[0]) * len(deep)))
            chance = batch.generator(0)
        first = _pick(shallow, count - count // 2, chance)
        left = deep.clone()
        left[first] = -torch.inf if chance is None else 0.0
        kept = torch.cat([first, _pick(left, count // 2, chance)])
        return Selection(kept.sort().values, scores=(shallow + deep) / 2)

    def density(self, q: Tensor) -> float:
        """Share of rows that no row before them repeats: dropping repeats one by one leaves these."""
        alike = (q @ q.mT) >= self.tau
        dropped = torch.zeros(len(q), dtype=torch.bool, device=q.device)
        for i in range(len(q)):
            if not dropped[i]:
                dropped[i + 1 :] |= alike[i, i + 1 :]
        return 1.0 - float(dropped.double().mean())


def _pick(weight: Tensor, count: int, chance: torch.Generator | None) -> Tensor:
    """The `count` largest, or drawn in proportion (exponential races) among those above 0."""
    if chance is None or count == 0:
        return top(weight, count)
    drawn = torch.empty(weight.shape, dtype=torch.float64).exponential_(generator=chance).to(weight.device)
    return top(torch.where(weight > 0, weight / drawn, -drawn), count)

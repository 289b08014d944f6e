"""Token-level correlation: how many tokens of a picture are unlike all others says how many it deserves.

    density = share of tokens i with max_{j < i or j kept so far} cos(x_i, x_j) < tau
    sampled by [CLS] attention, half from a shallow and half from a deep layer

Source: token-level correlation-guided compression for document understanding; abstract public, the form is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    def idle(self) -> dict[str, str]:
        return {"tau": "variant='best'"} if self.variant == "best" else {}

    @property
    def adaptive(self) -> bool:
        return self.variant != "best"

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        if self.adaptive:
            return batch.one_by_one(lambda one: [self.drawn(one, count)])
        shallow, deep = batch.attention(layer=0), batch.attention(layer=-1)
        first = top(shallow, count - count // 2)
        second = top(deep.scatter(1, first, -torch.inf), count // 2)
        kept = torch.cat([first, second], 1).sort(1).values
        return [Selection(k, scores=score) for k, score in zip(kept, (shallow + deep) / 2)]

    def drawn(self, one: Batch, count: int) -> Selection:
        """The answer of one unit where its density sets the count."""
        shallow, deep = one.attention(layer=0)[0], one.attention(layer=-1)[0]
        count, chance = min(count, math.ceil(self.density(one.units()[0]) * len(deep))), one.generator(0)
        first = _draw(shallow, count - count // 2, chance)
        second = _draw(deep.index_fill(0, first, 0.0), count // 2, chance)
        return Selection(torch.cat([first, second]).sort().values, scores=(shallow + deep) / 2)

    def density(self, q: Tensor) -> float:
        """Share of rows that no row before them repeats: dropping repeats one by one leaves these."""
        alike = (q @ q.mT) >= self.tau
        dropped = torch.zeros(len(q), dtype=torch.bool, device=q.device)
        for i in range(len(q)):
            if not dropped[i]:
                dropped[i + 1 :] |= alike[i, i + 1 :]
        return 1.0 - float(dropped.double().mean())


def _draw(weight: Tensor, count: int, chance: torch.Generator) -> Tensor:
    """`count` drawn in proportion (exponential races), those of weight 0 last."""
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=weight.device)
    drawn = torch.empty(weight.shape, dtype=torch.float64).exponential_(generator=chance).to(weight.device)
    return top(torch.where(weight > 0, weight / drawn, -drawn), count)

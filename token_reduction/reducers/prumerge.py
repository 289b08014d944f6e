"""LLaVA-PruMerge and PruMerge+: attention outliers stay and take in the tokens whose keys are nearest.

    a = [CLS] attention (as released: softmax of the joined heads' product);   kept i:  x_i + sum over its 32 nearest keys a_j x_j
    one more row:          sum over the tokens that are not kept a_j x_j
    PruMerge+ adds tokens on an even grid to the kept ones

Source: LLaVA-PruMerge, "Adaptive Token Reduction for Efficient Large Multimodal Models", sections 3.2 to 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.exact import evenly, rest, rows_at, top
from token_reduction.options import SHARE, Limits, Range
from token_reduction.unit_reducer import UnitReducer


def outliers(attention: Tensor) -> int:
    """How many entries lie above the third quartile by more than 1.5 interquartile ranges.

    >>> outliers(torch.tensor([0.01] * 90 + [0.02] * 6 + [0.3] * 4))
    10
    """
    low, high = attention.double().quantile(torch.tensor([0.25, 0.75], dtype=torch.float64, device=attention.device))
    return int((attention > high + 1.5 * (high - low)).sum())


@dataclass(frozen=True, kw_only=True)
class PruMerge(UnitReducer):
    """Keep k rows of each frame: k - 1 tokens with what is like them, and one row that gathers the rest.

    Args:
        neighbours: nearest keys that a kept token takes in.
        variant: "best" keeps exactly k and makes every row a mean (weights 1 and a_j over their sum). "paper" and "released"
            keep as many tokens as there are attention outliers, k at most (`count` is an upper bound), and add without
            dividing. "released" also joins the heads as the released code does: a = softmax(q k / sqrt(C)) over the patches, from
            `cls_logits`. Rows are in raster order throughout; the released code leaves them in order of attention.

    The row of the rest sits at the rest's most attended token. Scores: a.
    """

    neighbours: int = 32
    limits: ClassVar[Limits] = {"neighbours": Range(0)}
    name: ClassVar[str] = "prumerge"
    cost: ClassVar[str] = "O(k n D)"
    source: ClassVar[str] = "LLaVA-PruMerge"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "authors'"
    scope: ClassVar[str] = "frame"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"keys", "cls_logits" if self.variant == "released" else "cls_attn"})

    @property
    def adaptive(self) -> bool:
        return self.variant != "best"

    def attention(self, batch: Batch) -> Tensor:
        """(B, n) a."""
        if self.variant != "released":
            return batch.attention()
        logits = batch.heads("cls_logits")
        return torch.softmax(logits.sum(-1) / logits.shape[-1] ** 0.5, -1)

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        if self.adaptive and len(batch.x) > 1:  # each unit has a count of its own
            return batch.one_by_one(lambda one: self.select(one, count))
        attention, keys = self.attention(batch), batch.units("keys")
        chosen, n = self.chosen(attention, max(1, count - 1)), attention.shape[1]
        others = rest(n, chosen)
        gathers = count > 1 and others.shape[1] > 0
        last = others.gather(1, attention.gather(1, others).argmax(1, keepdim=True)) if gathers else chosen[:, :0]
        kept = torch.cat([chosen, last], 1).sort().values
        cosine = rows_at(keys, chosen) @ keys.mT
        cosine.scatter_(2, chosen[..., None], -torch.inf)
        near = top(cosine, min(self.neighbours, n - 1))
        weight = torch.zeros_like(cosine)
        weight.scatter_(2, near, attention[:, None].expand_as(weight).gather(2, near))
        weight.scatter_(2, chosen[..., None], 1.0)
        place = torch.searchsorted(kept, chosen.contiguous())
        matrix = attention.new_zeros(*kept.shape, n)
        matrix.scatter_(1, place[..., None].expand_as(weight), weight)
        if gathers:
            around = torch.zeros_like(attention).scatter_(1, others, attention.gather(1, others))
            at = torch.searchsorted(kept, last)
            matrix.scatter_(1, at[..., None].expand(-1, -1, n), around[:, None])
        if self.variant == "best":
            matrix = matrix / matrix.sum(-1, keepdim=True).clamp_min(1e-300)
        return [Selection.weighted(*unit) for unit in zip(kept, matrix, attention)]

    def chosen(self, attention: Tensor, count: int) -> Tensor:
        """(B, m) tokens kept before merging, `count` or, adaptive, at most `count` (of one unit)."""
        if self.adaptive:
            count = max(1, min(count, outliers(attention[0])))
        return top(attention, count)


@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """`PruMerge` with spatial tokens: some of the k - 1 tokens by attention, the others evenly spread over what is left.

    Args:
        attended: share of the k - 1 tokens chosen by attention (variant "best"; 13 of 64 in a published fixed-count form).

    Variants "paper" and "released": as many by attention as there are outliers, and every third of a stride n / outliers, k - 1
    in all at most.
    """

    attended: float = 13 / 64
    limits: ClassVar[Limits] = {**PruMerge.limits, "attended": SHARE}
    name: ClassVar[str] = "prumerge_plus"
    source: ClassVar[str] = "LLaVA-PruMerge+"

    @property
    def idle(self) -> dict[str, str]:
        return {"attended": f"variant={self.variant!r}"} if self.adaptive else {}

    def chosen(self, attention: Tensor, count: int) -> Tensor:
        n = attention.shape[1]
        if not self.adaptive:
            first = top(attention, max(1, round(self.attended * count)))
            others = rest(n, first)
            spread = evenly(others.shape[1], count - first.shape[1]).to(others.device)
            return torch.cat([first, others[:, spread]], 1)
        found = max(1, min(count, outliers(attention[0])))
        first = top(attention, found)
        grid = torch.arange(0, n - 1, max(1, int(n // found / 3)), device=attention.device)
        grid = grid[~torch.isin(grid, first)]
        return torch.cat([first, grid[evenly(len(grid), min(len(grid), count - found)).to(grid.device)][None]], 1)

"""LLaVA-PruMerge and PruMerge+: attention outliers stay and take in the tokens whose keys are nearest.

    a = [CLS] attention;   kept i:  x_i + sum over its 32 nearest keys a_j x_j
    one more row:          sum over the tokens that are not kept a_j x_j
    PruMerge+ adds tokens on an even grid to the kept ones

Source: LLaVA-PruMerge, "Adaptive Token Reduction for Efficient Large Multimodal Models", sections 3.2 to 3.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.exact import evenly, rest, top
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
            dividing. Rows are in raster order throughout; the released code leaves them in order of attention.

    The row of the rest sits at the rest's most attended token. Scores: [CLS] attention.
    """

    neighbours: int = 32
    name: ClassVar[str] = "prumerge"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attn", "keys"})
    cost: ClassVar[str] = "O(k n D)"
    source: ClassVar[str] = "LLaVA-PruMerge"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "authors'"
    scope: ClassVar[str] = "frame"

    @property
    def adaptive(self) -> bool:
        return self.variant != "best"

    def select_one(self, batch: Batch, count: int) -> Selection:
        attention, keys = batch.attention()[0], batch.units("keys")[0]
        chosen = self.chosen(attention, count - 1 if count > 1 else 1)
        others = rest(len(attention), chosen)
        last = others[attention[others].argmax()][None] if count > 1 and len(others) else chosen[:0]
        kept = torch.cat([chosen, last]).sort().values
        matrix = attention.new_zeros(len(kept), len(attention))
        cosine = keys[chosen] @ keys.mT
        cosine[torch.arange(len(chosen)), chosen] = -torch.inf
        near = top(cosine, min(self.neighbours, len(attention) - 1))
        place = torch.searchsorted(kept, chosen)
        matrix[place[:, None], near] = attention[near]
        matrix[place, chosen] = 1.0
        if len(last):
            matrix[torch.searchsorted(kept, last)[:, None], others] = attention[others]
        if self.variant == "best":
            matrix = matrix / matrix.sum(1, keepdim=True).clamp_min(1e-300)
        return Selection.weighted(kept, matrix, attention)

    def chosen(self, attention: Tensor, count: int) -> Tensor:
        """Tokens kept before merging, `count` or, adaptive, at most `count`."""
        if self.adaptive:
            count = max(1, min(count, outliers(attention)))
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
    name: ClassVar[str] = "prumerge_plus"
    source: ClassVar[str] = "LLaVA-PruMerge+"

    def chosen(self, attention: Tensor, count: int) -> Tensor:
        if self.adaptive:
            found = max(1, min(count, outliers(attention)))
            first = top(attention, found)
            step = max(1, int(len(attention) // found / 3))
            grid = torch.arange(0, len(attention) - 1, step, device=attention.device)
            grid = grid[~torch.isin(grid, first)]
            return torch.cat([first, grid[evenly(len(grid), min(len(grid), count - found))]])
        first = top(attention, max(1, round(self.attended * count)))
        others = rest(len(attention), first)
        return torch.cat([first, others[evenly(len(others), count - len(first)).to(others.device)]])

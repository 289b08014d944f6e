"""ToDRE stage 1: diverse tokens grown from the one that [CLS] attends to most.

    pivot = arg-max [CLS] attention;   then k - 1 times
    k-center (first version)    arg-max_v min_{c kept} (1 - cos(v, c))
    max-sum (second version)    arg-min_v sum_{c kept} cos(v, c)

Source: ToDRE, "Effective Visual Token Pruning via Token Diversity and Task Relevance", stage 1, versions 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from token_reduction.batch import Batch, Selection
from token_reduction.exact import fixed_mean
from token_reduction.options import Limits
from token_reduction.rows import UnitRows
from token_reduction.selectors.diversity import max_sum
from token_reduction.selectors.farthest import SMALL, farthest_batch, farthest_from
from token_reduction.unit_reducer import UnitReducer

_FORMS = ("k-center", "max-sum")


@dataclass(frozen=True, kw_only=True)
class ToDRE(UnitReducer):
    """Keep k tokens of each item, chosen for diversity from the pivot.

    Args:
        diversity: "k-center" or "max-sum". None: k-center for variant "best", which covers natural video better (max-sum
            gathers near-duplicates at the extremes); max-sum, the form of the latest version, for "paper" and "released".
        thumbnail: look for the pivot in frame 0 alone (any-resolution input, whose first image is the thumbnail).
        center: take the item's mean off every token before the cosine.
    """

    diversity: str | None = None
    thumbnail: bool = False
    center: bool = False
    limits: ClassVar[Limits] = {"diversity": _FORMS}
    name: ClassVar[str] = "todre"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attn"})
    cost: ClassVar[str] = "O(k n D) time, O(n D) memory"
    source: ClassVar[str] = "ToDRE, stage 1 (both published forms)"
    form: ClassVar[str] = "authors'"
    flat: ClassVar[bool] = True

    def work(self, item: tuple[int, int, int], count: int, width: int) -> float:
        return float(item[0] * item[1] * item[2]) * count * width

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        attention, (_, n, _) = batch.attention(), batch.x.shape
        if n > SMALL and len(batch.x) > 1:
            return batch.one_by_one(lambda one: self.select(one, count))
        _, h, w = batch.grid
        pivot = (attention[:, : h * w] if self.thumbnail else attention).argmax(1)
        form = self.diversity or ("k-center" if self.variant == "best" else "max-sum")
        if form == "max-sum":
            order = max_sum(batch.units(center=self.center), count, pivot)
        elif n <= SMALL:
            order, _ = farthest_batch(batch.units(center=self.center), count, pivot)
        else:
            rows = UnitRows(batch.x[0], fixed_mean(batch.x[0]) if self.center else None)
            order = farthest_from(rows, count, int(pivot))[None]
        return [Selection(kept) for kept in order.sort(-1).values]

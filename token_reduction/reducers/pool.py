"""Pool: average the cells of a coarser grid inside each frame. What plain down-sampling gives, as a baseline.

    frame h x w  ->  h' x w' cells; cell i of h' spans lines floor(i h / h') .. floor((i+1) h / h') - 1, columns alike

The cells share no token and leave none out. The row of a cell sits at its anchor, the token nearest to the cell's centre
(the lowest index on ties).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from token_reduction.budget import Budget
from token_reduction.reducer import Reducer
from token_reduction.reduction import Reduction
from token_reduction.tokens import TokenShard, check_grid
from tokenring.transport import Transport

_LONGEST = 2.0


@lru_cache(maxsize=256)
def output_grid(h: int, w: int, cells: int) -> tuple[int, int]:
    """The (h', w') with most cells, h' w' <= `cells`, whose cells are at most twice as long as they are wide.

    Ties go to squarer cells, then to fewer lines. Where no such grid fits, the one with the squarest cells is taken.

    >>> output_grid(16, 16, 64), output_grid(16, 16, 23), output_grid(2, 8, 4)
    ((8, 8), (4, 5), (1, 4))
    """
    fits = [(a, b) for a in range(1, min(h, cells) + 1) for b in range(1, min(w, cells // a) + 1)]
    stretch = {(a, b): max(h * b / (w * a), w * a / (h * b)) for a, b in fits}
    square = [shape for shape in fits if stretch[shape] <= _LONGEST]
    if not square:
        return min(fits, key=lambda shape: (stretch[shape], -shape[0] * shape[1], shape))
    return min(square, key=lambda shape: (-shape[0] * shape[1], stretch[shape], shape))


@dataclass(frozen=True, kw_only=True)
class Pool(Reducer):
    """Average pooling to (T, h', w') rows per item, with T h' w' at most max(1, round(r n)) or min(k, n).

    The budget is an upper bound: `count` says the whole grid that fits, chosen by `output_grid(h, w, budget // T)`. Frames
    are never mixed, so a budget below one token per frame is refused. Integer planes take the anchor's value.

    Variants: one algorithm; best, paper and released are the same. Scores: none. On several ranks each cell must lie on one
    rank whole (ranks that hold whole frames always satisfy this); anything else is refused, and nothing is sent.

    >>> Pool().count([(4, 16, 16)], Budget.ratio(0.25)), Pool().count([(4, 16, 16)], Budget.count(110))
    ([256], [100])
    """

    name: ClassVar[str] = "pool"
    cost: ClassVar[str] = "O(n D)"
    source: ClassVar[str] = "average pooling, baseline"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "authors'"

    def count(self, grid: Any, budget: Budget | None) -> list[int]:
        items = check_grid(grid)
        limits = super().count(items, budget)
        shapes = [self.shape(item, limit, number) for number, (item, limit) in enumerate(zip(items, limits))]
        return [item[0] * a * b for item, (a, b) in zip(items, shapes)]

    @staticmethod
    def shape(item: tuple[int, int, int], limit: int, number: int = 0, name: str = "pool") -> tuple[int, int]:
        """(h', w') of an item whose budget is `limit` tokens."""
        t, h, w = item
        if limit < t:
            raise ValueError(
                f"{name} keeps at least one token per frame: item {number} has {t} frames and a budget of {limit} tokens; "
                f"raise the budget to {t} or more, or choose another method"
            )
        return output_grid(h, w, limit // t) if t else (1, 1)

    def problem(self, shard: TokenShard, counts: Sequence[int]) -> str | None:
        cell, _, size = self.cells(shard, counts)
        _, number, held = cell.unique(return_inverse=True, return_counts=True)
        cut = (held[number] != size).nonzero()[:, 0]
        if cut.numel():
            return (
                f"pool cannot average a cell that lies on several ranks: the cell of row {int(shard.global_index[cut[0]])} "
                "is cut; give each rank whole frames"
            )
        return super().problem(shard, counts)

    def reduce_shard(
        self,
        shard: TokenShard,
        counts: Sequence[int],
        transport: Transport,
        generator: torch.Generator | None,
    ) -> Reduction:
        cell, anchor, size = self.cells(shard, counts)
        row, source = cell.sort(stable=True)
        _, row, sizes = row.unique_consecutive(return_inverse=True, return_counts=True)
        index = anchor.nonzero()[:, 0]
        offsets = torch.searchsorted(index, torch.tensor(shard.bounds, device=index.device)).cpu()
        weight = 1.0 / size[source].double()
        where = shard.global_index[index]
        return Reduction(index, offsets, row, source, weight, sizes, shard.x.shape[0], None, where)

    def cells(self, shard: TokenShard, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each local row, (n,): its cell's number in the whole batch, whether it is the anchor, the cell's tokens."""
        parts, bounds, before = [], shard.bounds, 0
        for item, (grid, count) in enumerate(zip(shard.grid, counts)):
            t, h, w = grid
            a, b = self.shape(grid, count, item)
            inside = shard.global_index[bounds[item] : bounds[item + 1]] - shard.cu_seqlens[item].item()
            line, middle_line, lines = _strip(inside % (h * w) // w, h, a)
            column, middle_column, columns = _strip(inside % w, w, b)
            number = before + (inside // (h * w) * a + line) * b + column
            parts.append((number, middle_line & middle_column, lines * columns))
            before += t * a * b
        cell, anchor, size = (torch.cat(part) for part in zip(*parts))
        return cell, anchor, size


def _strip(place: Tensor, length: int, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one side: the cell of each place, whether the place is the cell's middle, and the cell's length."""
    cell = ((place + 1) * cells - 1) // length
    first, last = cell * length // cells, (cell + 1) * length // cells
    return cell, place == (first + last - 1) // 2, last - first

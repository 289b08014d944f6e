"""Downsample: bilinear interpolation of each frame's token map to a coarser grid. A baseline that many methods do not beat.

    row (i, j) of h' x w' sits at y = (i + 1/2) h / h' - 1/2, x likewise, between four tokens

Source: VTC-Bench finds plain image down-sampling above many methods; this is its counterpart on features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.budget import Budget
from token_reduction.reducers.pool import Pool
from token_reduction.tokens import check_grid
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class Downsample(UnitReducer):
    """Keep (T, h', w') rows per item, the largest grid that fits the budget (as `pool`), each interpolated from its four
    nearest tokens and placed at the nearest of them.

    The budget is an upper bound, as for `pool`; below one row per frame is refused. Scores: none. Variants: one algorithm.
    """

    name: ClassVar[str] = "downsample"
    cost: ClassVar[str] = "O(k D)"
    source: ClassVar[str] = "bilinear interpolation; baseline after VTC-Bench"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "ours"
    scope: ClassVar[str] = "frame"

    def count(self, grid: Any, budget: Budget | None) -> list[int]:
        items = check_grid(grid)
        shapes = [
            Pool.shape(item, limit, number, self.name)
            for number, (item, limit) in enumerate(zip(items, super().count(items, budget)))
        ]
        return [item[0] * a * b for item, (a, b) in zip(items, shapes)]

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        _, h, w = batch.grid
        a, b = Pool.shape((1, h, w), count)
        matrix = torch.kron(_line(h, a), _line(w, b)).to(batch.x.device)
        middle_y, middle_x = _middles(h, a), _middles(w, b)
        kept = (middle_y[:, None] * w + middle_x).flatten().to(batch.x.device)
        return [Selection.weighted(kept, matrix)] * batch.x.shape[0]


def _places(length: int, cells: int) -> Tensor:
    return ((torch.arange(cells, dtype=torch.float64) + 0.5) * length / cells - 0.5).clamp(0, length - 1)


def _line(length: int, cells: int) -> Tensor:
    """(cells, length) float64 interpolation weights along one side."""
    place = _places(length, cells)
    low = place.floor().long()
    part = place - low
    weight = torch.zeros(cells, length, dtype=torch.float64)
    rows = torch.arange(cells)
    weight[rows, low] += 1 - part
    weight[rows, (low + 1).clamp(max=length - 1)] += part
    return weight


def _middles(length: int, cells: int) -> Tensor:
    return (2 * torch.arange(cells) + 1) * length // (2 * cells) - (length % cells == 0) * ((length // cells) % 2 == 0)

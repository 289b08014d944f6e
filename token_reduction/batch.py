"""What an algorithm sees: units of one shape side by side, and what it answers for each.

A *unit* is what a method looks at as one: a whole item, or one frame of it. Units are runs of rows, so an answer in a unit's
own numbering becomes rows of the batch by adding where the unit begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from token_reduction.exact import unit_rows


@dataclass(frozen=True, eq=False)
class Batch:
    """B units of one grid.

    Attributes:
        x: (B, n, D) features.
        grid: (T, h, w) of each unit, T h w = n.
        channels: (B, n, ...) what the method needs, by name.
        texts: (m, D) that goes with each unit, or None.
        seeds: for each unit, the seed of its own chance.
    """

    x: Tensor
    grid: tuple[int, int, int]
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    texts: tuple[Tensor | None, ...] = ()
    seeds: tuple[int, ...] = ()

    def units(self, channel: str | None = None, center: bool = False, mean_heads: bool = False) -> Tensor:
        """Exact unit rows (B, n, D) float64 of x, or of a channel: heads side by side, or their mean where they are told apart."""
        value = self.x if channel is None else self.channels[channel]
        if mean_heads and value.dim() == 4:
            value = value.double().mean(2)
        return unit_rows(value.flatten(2), center)

    def attention(self, channel: str = "cls_attn", layer: int = -1) -> Tensor:
        """(B, n) float64 attention of one layer of a channel that may hold several."""
        value = self.channels[channel].double()
        return value if value.dim() == 2 else value[..., layer]

    def generator(self, unit: int) -> torch.Generator:
        """The chance of one unit: the same on every rank and for every batching."""
        return torch.Generator().manual_seed(self.seeds[unit])

    def single(self, unit: int) -> Batch:
        """One unit alone."""
        part = slice(unit, unit + 1)
        channels = {name: value[part] for name, value in self.channels.items()}
        return Batch(self.x[part], self.grid, channels, self.texts[part], self.seeds[part])

    @property
    def text(self) -> Tensor | None:
        """Of a batch of one unit."""
        assert len(self.x) == 1
        return self.texts[0] if self.texts else None


@dataclass(frozen=True, eq=False)
class Selection:
    """A unit's answer, all numbers inside the unit.

    Attributes:
        kept: (k,) int64 anchors, ascending (a token may stand twice where a method's released code repeats it).
        row, source, weight: (M,) entries of W ordered by row, then source, or None where W is one-hot.
        scores: (n,) or None.
    """

    kept: Tensor
    row: Tensor | None = None
    source: Tensor | None = None
    weight: Tensor | None = None
    scores: Tensor | None = None

    @classmethod
    def merge(
        cls, kept: Tensor, row: Tensor, source: Tensor, weight: Tensor | None = None, scores: Tensor | None = None
    ) -> Selection:
        """Entries in any order. weight None: every kept row is the mean of its sources."""
        order = torch.argsort(row * (int(source.max()) + 1 if source.numel() else 1) + source)
        row, source = row[order], source[order]
        if weight is None:
            weight = 1.0 / torch.bincount(row, minlength=kept.numel())[row].double()
        else:
            weight = weight[order].double()
        return cls(kept, row, source, weight, scores)

    @classmethod
    def groups(cls, kept: Tensor, group: Tensor, scores: Tensor | None = None) -> Selection:
        """Means of disjoint groups. group: (n,) int64, the place in `kept` that each token falls in, -1 for none."""
        source = (group >= 0).nonzero()[:, 0]
        return cls.merge(kept, group[source], source, None, scores)

    @classmethod
    def weighted(cls, kept: Tensor, matrix: Tensor, scores: Tensor | None = None) -> Selection:
        """Entries of a dense (k, n) matrix, zeros left out; a row of zeros takes its anchor alone with weight 0."""
        row, source = matrix.nonzero(as_tuple=True)
        return cls.merge(kept, row, source, matrix[row, source], scores)

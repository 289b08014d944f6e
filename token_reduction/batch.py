"""What an algorithm sees: units of one shape side by side, and what it answers for each.

A *unit* is what a method looks at as one: a whole item, or one frame of it. Units are runs of rows, so an answer in a unit's
own numbering becomes rows of the batch by adding where the unit begins.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
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
        frames: for each unit, how many frames its item has.
    """

    x: Tensor
    grid: tuple[int, int, int]
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    texts: tuple[Tensor | None, ...] = ()
    seeds: tuple[int, ...] = ()
    frames: tuple[int, ...] = ()

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

    def heads(self, channel: str) -> Tensor:
        """(B, n, heads) float64 of a channel of one number per token, or per token and head."""
        value = self.channels[channel].double()
        return value if value.dim() == 3 else value[..., None]

    def generator(self, unit: int) -> torch.Generator:
        """The chance of one unit: the same on every rank and for every batching."""
        return torch.Generator().manual_seed(self.seeds[unit])

    def take(self, units: Sequence[int]) -> Batch:
        """Some of the units."""
        if len(units) == len(self.x):
            return self
        rows = slice(units[0], units[0] + 1) if len(units) == 1 else torch.tensor(units, device=self.x.device)
        channels = {name: value[rows] for name, value in self.channels.items()}
        texts, seeds, frames = (
            [values[u] for u in units if values] for values in (self.texts, self.seeds, self.frames)
        )
        return Batch(self.x[rows], self.grid, channels, tuple(texts), tuple(seeds), tuple(frames))

    def by(self, kinds: Sequence[Hashable], select: Callable[[Batch], Sequence[Selection]]) -> list[Selection]:
        """`select` of the units of each kind, answers in the units' order."""
        groups: dict[Hashable, list[int]] = {}
        for unit, kind in enumerate(kinds):
            groups.setdefault(kind, []).append(unit)
        answers = {u: a for units in groups.values() for u, a in zip(units, select(self.take(units)), strict=True)}
        return [answers[unit] for unit in range(len(self.x))]

    def one_by_one(self, select: Callable[[Batch], Sequence[Selection]]) -> list[Selection]:
        """`select` of every unit alone."""
        return self.by(range(len(self.x)), select)

    def by_text(self, select: Callable[[Batch], Sequence[Selection]]) -> list[Selection]:
        """`select` of the units that share a text: the frames of an item, or all."""
        return self.by([id(text) for text in self.texts], select)

    @property
    def text(self) -> Tensor:
        """Of a batch whose units share one."""
        assert len({id(text) for text in self.texts}) == 1
        return self.texts[0].to(self.x.device)


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

"""Methods that look at one unit at a time, an item or a frame: they write `select`, and run on any world.

    rows of all ranks ─ units cut between ranks are gathered on the ranks that hold a part ─ select ─ own rows of W

A unit that lies whole on one rank is reduced there and sends nothing. One that is cut is put together on all ranks, which
each choose alike and keep their own anchors; what a merge draws from elsewhere is borrowed (`borrow.py`). The choice sees the
same numbers in the same order whatever the partition, hence the same indices as on one rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.borrow import Borrow
from token_reduction.exact import finite, spread
from token_reduction.reducer import Reducer, refuse_unfinite
from token_reduction.reduction import Reduction
from token_reduction.rows import at_once
from token_reduction.tokens import TokenShard, text_of
from tokenring.transport import Transport

_FORMS = {
    "cls_attn": ((1, 2), "(N,) or (N, layers)"),
    "recv_attn": ((1, 2), "(N,) or (N, layers)"),
    "cls_logits": ((1, 2), "(N,) or (N, heads)"),
    "keys": ((2, 3), "(N, C) or (N, H, d)"),
    "queries": ((2, 3), "(N, C) or (N, H, d)"),
    "patches": ((2,), "(N, C)"),
}
"""Dims that a channel may have, and in words."""
_ROWS = (range(2, 9), "(N, ...)")


@dataclass(frozen=True)
class Unit:
    """Rows first..last-1 of the batch, which keep `count`."""

    item: int
    first: int
    last: int
    grid: tuple[int, int, int]
    count: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class UnitReducer(Reducer):
    """Base of methods that treat units alone. A subclass says its `scope` and writes `select`, for units of one shape at once."""

    scope: ClassVar[str] = "item"
    """"item", or "frame": every frame is reduced alone, and the item's count is spread evenly over its frames."""
    features: ClassVar[bool] = True
    """Whether `select` looks at x; channels alone travel otherwise."""
    draws: ClassVar[bool] = False
    """Whether the method uses chance."""

    @abstractmethod
    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        """An answer for each unit of the batch: exactly `count` kept rows, 1 <= count < n (<= n and
        at most `count` rows where `adaptive`). What else is in the batch must not change an answer."""

    def problem(self, shard: TokenShard, counts: Sequence[int]) -> str | None:
        return super().problem(shard, counts) or refuse_unfinite(self, shard) or refuse_channels(self, shard)

    def reduce_shard(
        self,
        shard: TokenShard,
        counts: Sequence[int],
        transport: Transport,
        generator: torch.Generator | None,
    ) -> Reduction:
        units = self._units(shard, counts, generator)
        planes = {"x": shard.x if self.features else shard.x[:, :0]}
        planes |= {name: shard.channels[name] for name in used_channels(self, shard)}
        pieces = _Pieces(shard, units, planes, transport)
        answers: dict[int, Selection] = {}
        for numbers in _alike(units, pieces.touched, shard.x):
            batch = pieces.batch(numbers)
            count, length = units[numbers[0]].count, batch.x.shape[1]
            everything = Selection(torch.arange(length, device=batch.x.device))
            whole = count == length and not self.adaptive
            chosen = [everything] * len(numbers) if whole else self.select(batch, count)
            answers |= dict(zip(numbers, chosen, strict=True))
        return _assemble(shard, units, answers, transport)

    def _units(self, shard: TokenShard, counts: Sequence[int], generator: torch.Generator | None) -> list[Unit]:
        units = []
        for item, ((t, h, w), count) in enumerate(zip(shard.grid, counts)):
            first, seed = int(shard.cu_seqlens[item]), self._seed(generator)
            if self.scope == "item":
                units.append(Unit(item, first, first + t * h * w, (t, h, w), count, seed))
                continue
            for frame, share in enumerate(spread(count, t) if t else []):
                begin = first + frame * h * w
                units.append(Unit(item, begin, begin + h * w, (1, h, w), share, seed + frame))
        return units

    def _seed(self, generator: torch.Generator | None) -> int:
        if not self.draws or generator is None:
            return 0
        return int(torch.randint(2**40, (), generator=generator, device=generator.device))


def used_channels(method: Reducer, shard: TokenShard) -> list[str]:
    """Channels with one entry per token that the method looks at: what it needs, and of what it wants what there is."""
    return sorted((method.needs - {"text"}) | (method.wants & set(shard.channels)))


def refuse_channels(method: UnitReducer, shard: TokenShard) -> str | None:
    """Why a channel that the method looks at cannot be what it should be, or None."""
    for name in used_channels(method, shard):
        value = shard.channels[name]
        allowed, forms = _FORMS.get(name, _ROWS)
        if value.dim() not in allowed or not value.shape[1:].numel():
            return f"{method.name} needs {name} as {forms}, got {tuple(value.shape)}"
        if not finite(value):
            return f"{method.name} compares {name} and it holds NaN or infinity; look at the encoder or the dtype"
        if name == "pixels" and value.numel() and not (value.min() >= -0.5 and value.max() <= 1.5):
            span = f"{float(value.min()):g} to {float(value.max()):g}"
            return (
                f"{method.name} needs pixels in 0..1, got {span}; divide bytes by 255, undo the encoder's normalisation"
            )
    if "text" not in method.needs:
        return None
    width = (shard.x if method.text_space == "x" else shard.channels[method.text_space]).shape[1:].numel()
    for item in range(len(shard.grid)):
        text = text_of(shard.channels, item)
        if text.dim() != 2 or text.shape[0] < 1 or text.shape[1] != width or not finite(text):
            return (
                f"{method.name} compares text with {method.text_space}: give finite rows (m, {width}), m >= 1, for item {item}, "
                f"got {tuple(text.shape)}; embed both in one space"
            )
    return None


class _Pieces:
    """The rows of the units that this rank has a part in: its own, and those gathered for units cut between ranks."""

    def __init__(
        self, shard: TokenShard, units: Sequence[Unit], planes: Mapping[str, Tensor], transport: Transport
    ) -> None:
        self.shard, self.units = shard, units
        edges = torch.tensor([[u.first, u.last] for u in units] or [[0, 0]], device=shard.x.device)
        self.own = torch.searchsorted(shard.global_index, edges).tolist()
        held = [last - first for first, last in self.own]
        self.touched = [i for i, u in enumerate(units) if held[i] and u.count]
        self.planes, self.at, self.cut = planes, None, set()
        if transport.world > 1:
            partial = [0 < held[i] < u.last - u.first and u.count > 0 for i, u in enumerate(units)]
            self._gather(torch.tensor(partial or [False], device=shard.x.device), transport)

    def _gather(self, partial: Tensor, transport: Transport) -> None:
        self.cut = set(torch.stack(transport.all_gather(partial[None].int())).amax((0, 1)).nonzero()[:, 0].tolist())
        if not self.cut:
            return
        mine = torch.cat([torch.arange(*self.own[i], device=partial.device) for i in sorted(self.cut)])
        where = torch.cat(transport.all_gather(self.shard.global_index[mine]))
        self.at, order = where.sort()
        self.gathered = {
            name: torch.cat(transport.all_gather(plane[mine].contiguous()))[order]
            for name, plane in self.planes.items()
        }

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Units of one grid and count as one batch."""
        parts = {name: self._side_by_side(name, numbers) for name in self.planes}
        units = [self.units[i] for i in numbers]
        texts = tuple(text_of(self.shard.channels, unit.item) for unit in units)
        seeds, frames = tuple(unit.seed for unit in units), tuple(self.shard.grid[unit.item][0] for unit in units)
        return Batch(parts.pop("x"), units[0].grid, parts, texts, seeds, frames)

    def _side_by_side(self, name: str, numbers: Sequence[int]) -> Tensor:
        """(B, n, ...): the rows themselves where units follow each other, a copy otherwise. Never to be written to."""
        edges = [self.own[i] for i in numbers]
        if self.cut.isdisjoint(numbers) and all(left[1] == right[0] for left, right in pairwise(edges)):
            return self.planes[name][edges[0][0] : edges[-1][1]].unflatten(0, (len(numbers), -1)).contiguous()
        return torch.stack([self._rows(name, i) for i in numbers])

    def _rows(self, name: str, number: int) -> Tensor:
        if number not in self.cut:
            return self.planes[name][slice(*self.own[number])]
        edges = torch.tensor([self.units[number].first, self.units[number].last], device=self.at.device)
        return self.gathered[name][slice(*torch.searchsorted(self.at, edges).tolist())]


def _alike(units: Sequence[Unit], touched: Sequence[int], x: Tensor) -> Iterator[list[int]]:
    """Runs of units that can be one batch: same grid and count, and not too large together."""
    groups: dict[tuple, list[int]] = {}
    for number in touched:
        unit = units[number]
        groups.setdefault((unit.grid, unit.count), []).append(number)
    for ((t, h, w), _), numbers in groups.items():
        size = at_once(t * h * w, x.shape[1], x.device)
        yield from (numbers[i : i + size] for i in range(0, len(numbers), size))


def _assemble(
    shard: TokenShard, units: Sequence[Unit], answers: dict[int, Selection], transport: Transport
) -> Reduction:
    """This rank's rows of W from the answers of the units it has a part in."""
    device = shard.x.device
    index, items, rows, sources, weights, sizes = [], [], [], [], [], []
    scores = torch.zeros(shard.x.shape[0], device=device) if _scored(answers, transport, device) else None
    before = 0
    for number in sorted(answers):
        unit, answer = units[number], answers[number]
        local = shard.find(unit.first + answer.kept.to(device))
        here = (local >= 0).nonzero()[:, 0]
        index.append(local[here])
        items.append(torch.full_like(here, unit.item))
        row, source, weight, size = _entries(answer, here)
        rows.append(row + before)
        sources.append(source + unit.first)
        weights.append(weight)
        sizes.append(size)
        before += here.numel()
        if scores is not None and answer.scores is not None:
            first, last = torch.searchsorted(shard.global_index, torch.tensor([unit.first, unit.last], device=device))
            scores[first:last] = answer.scores.to(device).float()[shard.global_index[first:last] - unit.first]
    none = torch.zeros(0, dtype=torch.int64, device=device)
    index, items, rows, sources, sizes = (torch.cat([none, *part]) for part in (index, items, rows, sources, sizes))
    weights = torch.cat([none.double(), *weights])
    offsets = torch.searchsorted(items, torch.arange(len(shard.grid) + 1, device=device)).cpu()
    source, borrow = _localise(shard, sources, transport)
    where = shard.global_index[index]
    return Reduction(index, offsets, rows, source, weights, sizes, shard.x.shape[0], scores, where, borrow)


def _scored(answers: dict[int, Selection], transport: Transport, device: torch.device) -> bool:
    """Whether the method gives scores; a rank without a unit learns it from the others."""
    own = torch.tensor([any(a.scores is not None for a in answers.values())], dtype=torch.int32, device=device)
    return bool(torch.cat(transport.all_gather(own, same_shape=True)).any())


def _entries(answer: Selection, here: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, source, weight of the kept rows `here`, renumbered from 0, and each row's size."""
    if answer.row is None:
        ones = torch.ones_like(here)
        return torch.arange(here.numel(), device=here.device), answer.kept.to(here.device)[here], ones.double(), ones
    row, source, weight = (part.to(here.device) for part in (answer.row, answer.source, answer.weight))
    sizes = torch.bincount(row, minlength=answer.kept.numel())
    place = torch.full((answer.kept.numel(),), -1, device=here.device)
    place[here] = torch.arange(here.numel(), device=here.device)
    mine = place[row] >= 0
    return place[row[mine]], source[mine], weight[mine], sizes[here]


def _localise(shard: TokenShard, sources: Tensor, transport: Transport) -> tuple[Tensor, Borrow | None]:
    """Local numbers of global sources; those of other ranks follow the own rows, in ascending order."""
    local = shard.find(sources)
    missing = sources[local < 0].unique()
    borrow = Borrow.agree(shard, missing, transport) if transport.world > 1 else None
    return torch.where(local >= 0, local, shard.x.shape[0] + torch.searchsorted(missing, sources)), borrow

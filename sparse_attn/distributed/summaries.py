"""What travels of queries so that the owner of a key can decide alone whether a group wants it.

    pooled, lse   mean query and mean anchor of each block                      (D + 1) numbers a block and query head
    rescore       smallest and largest entries of each box of rows              2 (D + 1) numbers a box and query head,
                                                                                each of a document's last rows being one
    every         nothing: every candidate passes, and the rows themselves decide when its key arrives

Where a block or box lies on two ranks, each sends its share: means add up by their rows, boxes by minimum and maximum. Each
part's numbers travel as one flat run whose length every rank knows.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Protocol

import torch
from torch import Tensor

from sparse_attn.config import AnchorConfig
from sparse_attn.distributed.cut import Cut, Part
from sparse_attn.geometry import Group
from sparse_attn.identify.ahead import groups_at_once
from sparse_attn.identify.means import MeanTest
from sparse_attn.identify.products import least_scores, reached, test_dtype, with_least, with_ones
from sparse_attn.identify.rows import LONG, box_edges, rows_alone
from tokenring.merge import accumulator_dtype
from tokenring.segments import Range

Flats = Sequence[tuple[Part, Tensor]]
"""The parts of a group, from all ranks, and their numbers."""


class Summary(Protocol):
    """One way of saying of queries what owners of keys must know."""

    dtype: torch.dtype
    """Of the numbers that travel."""

    def size(self, part: Part) -> int:
        """How many numbers a part sends to each owner of its candidates."""

    def of_part(self, part: Part) -> Tensor:
        """Those numbers, flat; asked on the rank that holds the part."""

    def wanted(self, told: Mapping[int, Flats], rows: Mapping[int, Sequence[Range]]) -> Iterator[tuple[int, Tensor]]:
        """For each group that has candidates among an owner's rows, asked there: its number, and bool (B, Hq, candidates).

        told: of all its parts. rows: its candidates, ascending by position; groups in their order.
        """


def runs(part: Part, edges: Sequence[int]) -> tuple[int, list[int]]:
    """The first of the runs between ascending edges that a part holds rows of, and how many of each.

    >>> runs(Part(group=0, rows=(0, 7), start=13, key=13), range(8, 28, 4))
    (1, [3, 4])
    """
    first = bisect_right(edges, part.start) - 1
    inner = edges[first + 1 : bisect_left(edges, part.start + part.count)]
    return first, [b - a for a, b in pairwise([part.start, *inner, part.start + part.count])]


class Means:
    """`pooled` and `lse`: scaled mean query and mean anchor of each block, as `sparse_attn.identify.means` tests them."""

    def __init__(self, cut: Cut, config: AnchorConfig, scale: float, q: Tensor, k: Tensor, anchor: Tensor) -> None:
        self.cut, self.scale, self.q, self.k, self.anchor = cut, scale, q, k, anchor
        self.test = MeanTest(k, config, q.shape[2], anchor)
        self.dtype, self.wide = q.dtype, anchor.dtype
        self.shape, self.dim = (q.shape[0], q.shape[2]), q.shape[3]

    def size(self, part: Part) -> int:
        _, counts = self._blocks(part)
        wide = self.wide.itemsize // self.dtype.itemsize
        return math.prod(self.shape) * len(counts) * (self.dim * self._width(part) + wide)

    def _width(self, part: Part) -> int:
        """Numbers for one of a mean. Shares of a mean are rounded once more when they add up, so they travel wide."""
        return self.wide.itemsize // self.dtype.itemsize if part.group in self.cut.shared else 1

    def _blocks(self, part: Part) -> tuple[int, list[int]]:
        group, block = self.cut.group(part), self.cut.geometry.block
        return runs(part, range(group.rows[0] - self._lead(group), group.rows[1] + block, block))

    def _lead(self, group: Group) -> int:
        """Rows of a group's first block that earlier chunks had: blocks lie at multiples of their length in a document."""
        return (group.diagonal - self.cut.geometry.documents[group.document][1][0]) % self.cut.geometry.block

    def of_part(self, part: Part) -> Tensor:
        _, counts = self._blocks(part)
        rows = slice(*part.rows)
        means = _mean(self.q[:, rows].transpose(1, 2).to(self.wide), counts) * self.scale
        anchors = _mean(self.anchor[:, :, rows].unsqueeze(3), counts)
        means = flat(means if part.group in self.cut.shared else means.to(self.dtype), self.dtype)
        return torch.cat([flat(anchors, self.dtype), means])

    def wanted(self, told: Mapping[int, Flats], rows: Mapping[int, Sequence[Range]]) -> Iterator[tuple[int, Tensor]]:
        for numbers in self._together(rows):
            counts = [_count(rows[number]) for number in numbers]
            means, anchors = (torch.stack(x, 2) for x in zip(*(self._put_together(n, told[n]) for n in numbers)))
            keys = (picked(k, rows[numbers[-1]]) for k in self.test.keys)
            found = [self.test.kept(m, a, k, counts) for m, a, k in zip(means, anchors, keys)]
            for place, (number, count) in enumerate(zip(numbers, counts)):
                yield number, torch.stack([entry[:, place, :count] for entry in found])

    def _together(self, rows: Mapping[int, Sequence[Range]]) -> Iterator[list[int]]:
        """Runs of groups of one document with as many rows and blocks: the candidates of each begin those of the next."""
        groups, each = self.cut.geometry.groups, self.shape[1] // self.k.shape[2]

        def kind(number: int) -> tuple[int, ...]:
            return groups[number].document, groups[number].count, self._lead(groups[number])

        for (_, count, _), alike in groupby(rows, kind):
            found = list(alike)
            rows_of_one = each * -(-count // self.cut.geometry.block)
            most = groups_at_once(rows_of_one, math.prod(self.shape), self.k.shape[1])
            for first in range(0, len(found), max(1, most)):
                yield found[first : first + max(1, most)]

    def _put_together(self, number: int, flats: Flats) -> tuple[Tensor, Tensor]:
        """Scaled mean queries (B, Hq, blocks, D) and mean anchors (B, Hq, blocks) of a group, out of its parts."""
        group, block = self.cut.geometry.groups[number], self.cut.geometry.block
        cuts = [0, *range(block - self._lead(group), group.count, block), group.count]
        sizes = [b - a for a, b in pairwise(cuts)]
        means = self.anchor.new_zeros(*self.shape, len(sizes), self.dim)
        anchors = self.anchor.new_zeros(*self.shape, len(sizes))
        for part, numbers in flats:
            first, counts = self._blocks(part)
            here = slice(first, first + len(counts))
            share = anchors.new_tensor([n / whole for n, whole in zip(counts, sizes[here])])
            head = math.prod(self.shape) * len(counts) * self.wide.itemsize // self.dtype.itemsize
            dtype = self.wide if number in self.cut.shared else self.dtype
            anchors[:, :, here] += unflat(numbers[:head], self.wide, (*self.shape, -1)) * share
            means[:, :, here] += unflat(numbers[head:], dtype, (*self.shape, len(counts), -1)) * share[:, None]
        return means, anchors


class Boxes:
    """`rescore`: smallest and largest entries of [scale * q, theta - lse] in each box, and how long the near keys are."""

    def __init__(
        self, cut: Cut, config: AnchorConfig, scale: float, q: Tensor, k: Tensor, lse: Tensor, near: Tensor
    ) -> None:
        """near: (B, Hkv, groups) mean squared length of the keys in each group's initial block and window, where known."""
        self.cut, self.config, self.scale, self.q, self.near = cut, config, scale, q, near
        self.dtype = test_dtype(q, config.scores)
        self.least = least_scores(lse, config.thetas(q.shape[2]), self.dtype)
        keys = with_ones(k, self.dtype)
        self.bounding = torch.cat([keys, keys.abs()], -1)
        self.lengths = k.to(lse.dtype).square().sum(-1).transpose(1, 2)
        self.shape = q.shape[0], q.shape[2]
        self.dim, self.key_heads = keys.shape[3], k.shape[2]

    def size(self, part: Part) -> int:
        _, boxed, alone = self._boxes(part)
        batch, heads = self.shape
        return self._near_size() + batch * heads * (2 * boxed + alone) * self.dim

    def _near_size(self) -> int:
        return self.shape[0] * self.key_heads * self.least.dtype.itemsize // self.dtype.itemsize

    def _boxes(self, part: Part) -> tuple[int, int, int]:
        """The first of the boxes that a part holds rows of, how many of several rows, and how many of one of the last rows."""
        group = self.cut.group(part)
        first, counts = runs(part, [group.rows[0] + edge for edge in self._edges(group)])
        alone = min(part.count, max(0, part.start + part.count - self._first_alone(group)))
        return first, len(counts) - alone, alone

    def _first_alone(self, group: Group) -> int:
        return group.rows[1] - rows_alone(group, self.cut.geometry, self.config.last)

    def _edges(self, group: Group) -> tuple[int, ...]:
        return box_edges(group.count, self.config.box, rows_alone(group, self.cut.geometry, self.config.last))

    def of_part(self, part: Part) -> Tensor:
        here = slice(*part.rows)
        rows = torch.stack(
            [with_least(q[here], least[:, here], self.scale, self.dtype) for q, least in zip(self.q, self.least)]
        )
        alone = rows.shape[2] - self._boxes(part)[2]
        ends = self._ends(rows[:, :, :alone], part).flatten()
        return torch.cat([flat(self.near[:, :, part.group], self.dtype), ends, rows[:, :, alone:].flatten()])

    def _ends(self, rows: Tensor, part: Part) -> Tensor:
        """(B, Hq, boxes, 2, d): smallest and largest entries of a part's boxes of more than one row, out of (B, Hq, rows, d)."""
        box, count = self.config.box, rows.shape[2]
        lead = (part.start - self.cut.group(part).rows[0]) % box if count else 0
        tail = -(lead + count) % box
        ends = rows[:, :, :1].expand(-1, -1, lead, -1), rows[:, :, -1:].expand(-1, -1, tail, -1)
        whole = torch.cat([ends[0], rows, ends[1]], 2)
        return torch.stack(torch.aminmax(whole.unflatten(2, (whole.shape[2] // box, box)), dim=3), 3)

    def wanted(self, told: Mapping[int, Flats], rows: Mapping[int, Sequence[Range]]) -> Iterator[tuple[int, Tensor]]:
        for number, here in rows.items():
            yield number, self._within_bound(number, told[number], here)

    def _within_bound(self, number: int, flats: Flats, rows: Sequence[Range]) -> Tensor:
        """bool (B, Hq, candidates) of one group."""
        group = self.cut.geometry.groups[number]
        shape = *self.shape, len(self._edges(group)) - 1, self.dim
        wide = accumulator_dtype(self.dtype)
        low = torch.full(shape, torch.inf, dtype=wide, device=self.q.device)
        high = torch.full_like(low, -torch.inf)
        for part, numbers in flats:
            first, boxed, alone = self._boxes(part)
            near = unflat(numbers[: self._near_size()], self.least.dtype, (self.shape[0], self.key_heads))
            told, cut = numbers[self._near_size() :].to(wide), math.prod(self.shape) * 2 * boxed * self.dim
            ends, single = told[:cut], told[cut:]
            ends, here = ends.view(*self.shape, boxed, 2, self.dim), slice(first, first + boxed)
            low[:, :, here] = torch.minimum(low[:, :, here], ends[:, :, :, 0])
            high[:, :, here] = torch.maximum(high[:, :, here], ends[:, :, :, 1])
            here = slice(first + boxed, first + boxed + alone)
            low[:, :, here] = high[:, :, here] = single.view(*self.shape, alone, self.dim)
        middle = (low + high) / 2
        stacks = torch.cat([middle, self.config.reach * (high - middle)], -1).to(self.dtype)
        return torch.stack([self._passed(stacks[e], near[e], e, rows) for e in range(self.shape[0])])

    def _passed(self, stacks: Tensor, near: Tensor, entry: int, rows: Sequence[Range]) -> Tensor:
        """bool (Hq, candidates) of one batch entry."""
        each = self.shape[1] // self.key_heads
        keys = picked(self.bounding[entry], rows, 1)
        heads = stacks.unflatten(0, (self.key_heads, each))
        passed = torch.stack([reached(boxes, x) for boxes, x in zip(heads, keys)])
        long = picked(self.lengths[entry], rows, 1) > LONG * near[:, None]
        return passed.logical_or_(long.unsqueeze(1)).flatten(0, 1)


class Nothing:
    """`every`: all candidates' keys travel, and each row decides for itself."""

    def __init__(self, q: Tensor) -> None:
        self.q, self.dtype = q, q.dtype

    def size(self, part: Part) -> int:
        return 0

    def of_part(self, part: Part) -> Tensor:
        return self.q.new_empty(0)

    def wanted(self, told: Mapping[int, Flats], rows: Mapping[int, Sequence[Range]]) -> Iterator[tuple[int, Tensor]]:
        for number, here in rows.items():
            yield number, torch.ones(*self.q.shape[::2], _count(here), dtype=torch.bool, device=self.q.device)


def _count(rows: Sequence[Range]) -> int:
    return sum(b - a for a, b in rows)


def picked(x: Tensor, rows: Sequence[Range], dim: int = 0) -> Tensor:
    """Some runs of rows; a view where there is one."""
    parts = [x.narrow(dim, a, b - a) for a, b in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as flat numbers of a dtype as wide or narrower, bit for bit."""
    return x.flatten().contiguous().view(dtype)


def unflat(numbers: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """What `flat` was given."""
    return numbers.clone().view(dtype).view(shape)


def _mean(x: Tensor, counts: list[int]) -> Tensor:
    """(B, H, runs, D) out of (B, H, rows, D): means of runs of rows."""
    if len(set(counts)) == 1:
        return x.unflatten(2, (len(counts), -1)).mean(3)
    return torch.stack([part.mean(2) for part in x.split(counts, 2)], 2)

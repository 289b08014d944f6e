"""Every query against its own anchor: all columns, or only those that a bound lets through.

    every     keep column j  <=>  q_i . k_j * scale - lse_i >= -theta  for some row i of the group
    rescore   the same test, asked only where  mid_u . k_j + reach * half_u . |k_j| >= -theta  for some box u

A box holds `box` neighbouring rows of [scale * q, theta - lse]: mid and half are the middle and half width of its smallest and largest
entries. With reach = 1 no row's score exceeds the bound, so nothing is lost; boxes of many dims are wide, and most columns
would pass. A smaller reach is a guess, and two kinds of columns could escape it: keys that are huge for one query while its
neighbours look away, so keys of more than twice the length (root mean square) of those in initial block and window are always
tested exactly; and what a single query retrieves by matching in all dims at once, which takes a reach of about 0.4. So the
last rows of a document, from which generation goes on, are boxes of their own, whose bound is the score itself.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sparse_attn.config import AnchorConfig
from sparse_attn.geometry import Geometry, Group
from sparse_attn.identify.ahead import Ahead, groups_at_once, reaching
from sparse_attn.identify.products import (
    least_scores,
    parted,
    reached,
    reached_early,
    test_dtype,
    with_least,
    with_ones,
)
from tokenring.merge import accumulator_dtype

LONG = 4.0
"""Squared length, beside the near keys' mean, beyond which `rescore` tests a key whatever its bound."""


class EveryFinder:
    """`identify="every"`: the reference for all others."""

    def __init__(
        self, q: Tensor, k: Tensor, lse: Tensor, geometry: Geometry, config: AnchorConfig, scale: float
    ) -> None:
        self.q, self.config, self.scale = q, config, scale
        self.dtype = test_dtype(q, config.scores)
        self.keys = with_ones(k, self.dtype)
        self.least = least_scores(lse, config.thetas(q.shape[2]), self.dtype)

    def kept(self, group: Group, entry: int) -> Tensor:
        """bool (Hq, candidates): see `Finder`."""
        heads = self.rows(group, entry).unflatten(0, (self.keys.shape[1], -1))
        keys = self.keys[entry, :, slice(*group.candidates)]
        return torch.cat([reached(rows, columns) for rows, columns in zip(heads, keys)])

    def passed(self, group: Group, entry: int) -> Tensor:
        """bool (Hq, candidates): all columns are tested."""
        count = group.candidate_keys
        return torch.ones(self.q.shape[2], count, dtype=torch.bool, device=self.q.device)

    def rows(self, group: Group, entry: int) -> Tensor:
        """(Hq, rows, d): the group's queries with the least scores that they keep."""
        rows = slice(*group.rows)
        return with_least(self.q[entry, rows], self.least[entry, :, rows], self.scale, self.dtype)


class RescoreFinder(EveryFinder):
    """`identify="rescore"`: a bound by boxes of queries, then the exact test of what passes."""

    def __init__(
        self, q: Tensor, k: Tensor, lse: Tensor, geometry: Geometry, config: AnchorConfig, scale: float
    ) -> None:
        super().__init__(q, k, lse, geometry, config, scale)
        self.alone = partial(rows_alone, geometry=geometry, last=config.last)
        self.ahead: Ahead[tuple[Tensor, Tensor]] = Ahead(geometry, self.alone)
        self.lengths = k.to(lse.dtype).square().sum(-1).transpose(1, 2)
        self.bounding = torch.cat([self.keys, self.keys.abs()], dim=-1)

    def kept(self, group: Group, entry: int) -> Tensor:
        """bool (Hq, candidates): see `Finder`."""
        rows, kept = self._within_bound(group, entry)
        span, each = slice(*group.candidates), rows.shape[0] // self.keys.shape[1]
        for head, (*asking, passed) in enumerate(zip(*parted(rows), kept)):
            columns = passed.nonzero()[:, 0]
            if len(columns):
                keys = self.keys[entry, head // each, span].index_select(0, columns)
                passed[columns] = reached_early(asking, keys)
        return kept

    def passed(self, group: Group, entry: int) -> Tensor:
        """bool (Hq, candidates): the columns that the bound lets through to the exact test."""
        return self._within_bound(group, entry)[1]

    def _within_bound(self, group: Group, entry: int) -> tuple[Tensor, Tensor]:
        """The group's rows, and bool (Hq, candidates)."""
        kv_heads, heads = self.keys.shape[1], self.q.shape[2]
        of_one = heads // kv_heads * (len(box_edges(group.count, self.config.box, self.alone(group))) - 1)
        at_once = groups_at_once(of_one, heads, self.keys.shape[2])
        rows, bound = self.ahead.of(group, entry, at_once, lambda groups: self._bound(groups, entry))
        passed = bound.unflatten(0, (kv_heads, -1))
        lengths = self.lengths[entry]
        long = lengths[:, slice(*group.candidates)] > LONG * near_length(lengths, group)[:, None]
        return rows, passed.logical_or_(long.unsqueeze(1)).flatten(0, 1)

    def _bound(self, groups: list[Group], entry: int) -> list[tuple[Tensor, Tensor]]:
        rows = [self.rows(group, entry) for group in groups]
        alone = self.alone(groups[0])
        boxed = torch.stack([boxes(x, self.config.box, self.config.reach, alone) for x in rows], 1)
        keys = self.bounding[entry, :, groups[0].candidates[0] : groups[-1].candidates[1]].transpose(0, 1)
        counts = [group.candidate_keys for group in groups]
        found = reaching(boxed, None, keys, counts)
        return [(rows[n], found[:, n, :count]) for n, count in enumerate(counts)]


def near_length(lengths: Tensor, group: Group) -> Tensor:
    """(Hkv): mean squared length of the keys of initial block and window, out of those of all keys (Hkv, Sk)."""
    return torch.cat([lengths[:, a:b] for a, b in group.prefix], 1).mean(1)


def rows_alone(group: Group, geometry: Geometry, last: int) -> int:
    """How many rows of a group are among the `last` ones of their document, a whole group's at most: boxes of their own."""
    after = geometry.documents[group.document][0][1] - group.rows[1]
    return min(max(0, min(last, geometry.rows) - after), group.count)


def box_edges(count: int, box: int, alone: int) -> tuple[int, ...]:
    """Where the boxes of a group of `count` rows begin, and where the last one ends.

    >>> box_edges(70, 32, 3)
    (0, 32, 64, 67, 68, 69, 70)
    """
    return (*range(0, count - alone, box), *range(count - alone, count + 1))


def boxes(rows: Tensor, box: int, reach: float, alone: int = 0) -> Tensor:
    """(n, boxes, 2 d): [middle, reach * half width] of each run of `box` rows of (n, R, d), and of each of the last `alone`."""
    single = rows[:, rows.shape[1] - alone :]
    single = torch.cat([single, torch.zeros_like(single)], -1)
    rows = rows[:, : rows.shape[1] - alone]
    if not rows.shape[1]:
        return single
    missing = -rows.shape[1] % box
    whole = rows if not missing else torch.cat([rows, rows[:, -1:].expand(-1, missing, -1)], 1)
    whole = whole.unflatten(1, (-1, box)).to(accumulator_dtype(rows.dtype))
    low, high = whole.amin(2), whole.amax(2)
    middle = (low + high) / 2
    boxed = torch.cat([middle, reach * (high - middle)], -1).to(rows.dtype)
    return torch.cat([boxed, single], 1) if alone else boxed

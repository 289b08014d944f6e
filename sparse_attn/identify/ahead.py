"""A few groups in one pass over their keys: few rows multiply slowly and wait for memory.

Groups are asked for one after the other; what was found along with one waits until it is asked for.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sparse_attn.geometry import Geometry, Group
from sparse_attn.identify.products import COLUMNS_ALIKE, COLUMNS_AT_ONCE, none_minus, runs

ROWS_AT_ONCE = 256
"""Rows of one key head that share a pass."""
RESULTS_AT_ONCE = 1 << 24
"""Numbers that may wait for their group."""

Found = TypeVar("Found")


class Ahead(Generic[Found]):
    """Results by group, found for several groups alike at a time."""

    def __init__(self, geometry: Geometry, alike: Callable[[Group], object] = lambda group: None) -> None:
        """alike: what else must be the same of groups that share a pass."""
        self.groups, self.alike = geometry.groups, alike
        self.number = {group: number for number, group in enumerate(geometry.groups)}
        self.waiting: dict[tuple[Group, int], Found] = {}

    def of(self, group: Group, entry: int, at_once: int, find: Callable[[list[Group]], Sequence[Found]]) -> Found:
        """The result of a group in a batch entry; `find` makes those of up to `at_once` groups where it is not there yet."""
        if (group, entry) not in self.waiting:
            groups = self._from(group, at_once)
            self.waiting = {(g, entry): found for g, found in zip(groups, find(groups))}
        return self.waiting.pop((group, entry))

    def _from(self, group: Group, at_once: int) -> list[Group]:
        first = self.number.get(group, len(self.groups))
        following = self.groups[first + 1 : first + max(1, at_once)]
        return [group, *takewhile(lambda g: self._kind(g) == self._kind(group), following)]

    def _kind(self, group: Group) -> tuple[object, ...]:
        return group.document, group.count, group.candidates[0], self.alike(group)


def groups_at_once(rows: int, heads: int, keys: int) -> int:
    """How many groups share a pass, of `rows` rows a key head each, for `heads` query heads and up to `keys` keys."""
    return min(ROWS_AT_ONCE // max(1, rows), RESULTS_AT_ONCE // max(1, heads * keys))


def group_maxima(rows: Tensor, anchors: Tensor, keys: Tensor, counts: Sequence[int]) -> Tensor:
    """(Hq, G, C): max over a group's rows of score - anchor, for the first keys of each group.

    Args:
        rows: (Hq, G, U, D), in the dtype of `keys` (C, Hkv, D).
        anchors: (Hq, G, U), whose dtype the result has.
        counts: ascending; how many keys each group asks about. What lies beyond holds anything.
    """
    found = anchors.new_empty(*_by_key_head(rows, keys)[:3], keys.shape[0])
    for here, scores in _scores(rows, anchors, keys, counts):
        found[here] = scores.amax(3)
    return found.flatten(0, 1)


def reaching(rows: Tensor, least: Tensor | None, keys: Tensor, counts: Sequence[int]) -> Tensor:
    """bool (Hq, G, C): where some row's score is its `least` (Hq, G, U) or more; None: 0 or more. Beyond `counts`: anything."""
    found = torch.empty(*_by_key_head(rows, keys)[:3], keys.shape[0], dtype=torch.bool, device=rows.device)
    for here, scores in _scores(rows, least, keys, counts):
        found[here] = none_minus(scores, 3)
    return found.flatten(0, 1)


def _by_key_head(rows: Tensor, keys: Tensor) -> tuple[int, ...]:
    """(Hkv, Hq / Hkv, G, U, D) for rows (Hq, G, U, D)."""
    return keys.shape[1], rows.shape[0] // keys.shape[1], *rows.shape[1:]


def _scores(
    rows: Tensor, anchors: Tensor | None, keys: Tensor, counts: Sequence[int]
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Scores above `anchors` (Hkv, Hq / Hkv, G, U, C), valid until the next, and where in (Hkv, Hq / Hkv, G, C) they belong."""
    kv_heads, each, groups, units, _ = _by_key_head(rows, keys)
    rows = rows.unflatten(0, (kv_heads, each))
    below = None if anchors is None else anchors.unsqueeze(3).unflatten(0, (kv_heads, each))
    threads = min(kv_heads, torch.get_num_threads())
    memory = rows.new_empty(threads * each * groups * units * min(COLUMNS_AT_ONCE, keys.shape[0] + COLUMNS_ALIKE))
    for head in range(0, kv_heads, threads):
        heads = slice(head, head + threads)
        for first, some in runs(keys[:, heads]):
            left, last = bisect_right(counts, first), min(first + len(some), keys.shape[0])
            stacked, across = rows[heads, :, left:].flatten(1, 3), some.permute(1, 2, 0)
            shape = *stacked.shape[:2], across.shape[2]
            scores = memory[: math.prod(shape)].view(shape)
            if len(stacked) == 1:
                # The operator for batches copies keys that are not all of their tensor; this one does not.
                torch.mm(stacked[0], across[0], out=scores[0])
            else:
                torch.bmm(stacked, across, out=scores)
            scores = scores.unflatten(1, (each, groups - left, units))[..., : last - first]
            if below is not None:
                scores = scores.to(below.dtype).sub_(below[heads, :, left:])
            yield (heads, slice(None), slice(left, None), slice(first, last)), scores

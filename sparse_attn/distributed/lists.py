"""Which rows of a rank's keys another rank wants, and for which of its groups and heads.

    one line a wanted row and key head:   int32   entry and key head * rows of the owner + row
                                          int32s  bit (group * query heads of a key head + head): wanted there

Groups are counted among those of the wanting rank that have candidates. What travels is the union over groups and heads: one
line, one row of keys and values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

BITS = 32


def words_for(bits: int) -> int:
    """int32s that hold so many bits; one at least, so that a line always has some."""
    return max(1, -(-bits // BITS))


def lines_of(words: Tensor) -> Tensor:
    """int32 (lines, 1 + W) of words (entries * key heads, rows, W), in the order of heads, then rows."""
    heads, rows = (words != 0).any(-1).nonzero().unbind(1)
    where = (heads * words.shape[1] + rows).to(torch.int32)
    return torch.cat([where[:, None], words[heads, rows]], 1)


class Lines(NamedTuple):
    """Some lines as columns of numbers."""

    heads: Tensor
    """int64 (lines): batch entry * key heads + key head."""
    columns: Tensor
    """int64 (lines): what a plan calls their rows."""
    words: Tensor
    """int32 (lines, W)."""

    def bits(self, count: int, heads: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each of `heads` batch entries * key heads: numbers of its lines by ascending column, and bool (count, lines)."""
        span = int(self.columns.max()) + 1 if len(self.columns) else 1
        order = (self.heads * span + self.columns).argsort()
        shifts = torch.arange(BITS, dtype=torch.int32, device=order.device)
        cuts = torch.searchsorted(self.heads[order], torch.arange(heads + 1, device=order.device)).tolist()
        for first, last in itertools.pairwise(cuts):
            lines = order[first:last]
            unpacked = (self.words[lines].unsqueeze(2) >> shifts) & 1
            yield lines, unpacked.flatten(1)[:, :count].bool().T


@dataclass(frozen=True, eq=False)
class Wanted:
    """The lines that one rank has of every owner, its own included, owners in order.

    Rows that it holds already, its own and its halo's, are *near*; the others are sent and lie head by head, those of a head
    in the order of its lines: *far*.
    """

    lines: Sequence[Tensor]
    """Of each owner: int32 (lines, 1 + W)."""
    near: Sequence[Tensor]
    """Of each owner: int64 (its rows), where the rank holds them already, or -1."""

    @cached_property
    def counts(self) -> list[int]:
        return [len(lines) for lines in self.lines]

    @cached_property
    def words(self) -> Tensor:
        """int32 (lines, W) of all owners."""
        return torch.cat([lines[:, 1:] for lines in self.lines])

    @cached_property
    def heads(self) -> Tensor:
        """int64 (lines): batch entry * key heads + key head."""
        pairs = zip(self.lines, map(len, self.near))
        return torch.cat([lines[:, 0].long() // max(1, length) for lines, length in pairs])

    @cached_property
    def rows(self) -> Tensor:
        """int64 (lines): row of the owner's shard."""
        pairs = zip(self.lines, map(len, self.near))
        return torch.cat([lines[:, 0].long() % max(1, length) for lines, length in pairs])

    @cached_property
    def columns(self) -> Tensor:
        """int64 (lines): row of [own rows, halo] for near lines, place among those of its head for far ones."""
        columns = torch.cat([near[rows] for near, rows in zip(self.near, self.rows.split(self.counts))])
        heads = self.heads[columns < 0]
        order = heads.argsort(stable=True)
        sizes = heads.bincount() if len(heads) else heads
        place = torch.empty_like(heads)
        place[order] = torch.arange(len(heads), device=heads.device) - (sizes.cumsum(0) - sizes)[heads[order]]
        columns[columns < 0] = place
        return columns

    @cached_property
    def far(self) -> Tensor:
        """bool (lines): the row has to be sent."""
        return torch.cat([near[rows] < 0 for near, rows in zip(self.near, self.rows.split(self.counts))])

    def some(self, which: Tensor) -> Lines:
        """The lines that a bool (lines) names, under the columns of their kind."""
        return Lines(self.heads[which], self.columns[which], self.words[which])

    def placed(self, arrived: Tensor, batch: int, key_heads: int) -> Tensor:
        """(B, most far rows of a head, Hkv, D) of what arrived (far lines, D)."""
        heads, columns = self.heads[self.far], self.columns[self.far]
        rows = int(columns.max()) + 1 if len(columns) else 0
        whole = arrived.new_zeros(batch, rows, key_heads, arrived.shape[1])
        whole[heads // key_heads, columns, heads % key_heads] = arrived
        return whole

    def only(self, words: Tensor) -> Wanted:
        """The lines with other words; those whose words are all zero are gone."""
        found = []
        for lines, part in zip(self.lines, words.split(self.counts)):
            left = (part != 0).any(1)
            found.append(torch.cat([lines[left, :1], part[left]], 1))
        return replace(self, lines=found)

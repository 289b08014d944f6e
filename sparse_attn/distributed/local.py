"""A rank's part of a call in row numbers of its own tensors, so that one device's kernels and gradients run it as it is.

near    | own rows | halo | rows to keep, copied side by side |       anchor regions, and columns that are held already
far     | rows of others, head by head |                              columns that were sent
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.distributed.cut import Cut
from sparse_attn.distributed.lists import Lines, Wanted
from sparse_attn.geometry import Geometry, Group
from sparse_attn.stripes import StripePlan


@dataclass(frozen=True)
class LocalGeometry(Geometry):
    """A geometry whose groups are given."""

    parts: tuple[Group, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.parts


def local_geometry(cut: Cut, rank: int) -> LocalGeometry:
    """A rank's parts as groups of its near tensors. Their candidates are the rows to keep: the others lie wherever they were
    sent. Parts count as one document as long as their own keys follow one another as their rows do."""
    base, g, groups = cut.base(rank), cut.geometry, []
    whole = (0, cut.layout.length(rank)), (0, base + len(cut.kept(rank)))
    documents = 0
    for part in cut.parts[rank]:
        diagonal, candidates = cut.diagonal(rank, part), cut.group(part).candidates
        if groups and diagonal - part.rows[0] != groups[-1].diagonal - groups[-1].rows[0]:
            documents += 1
        kept = tuple(base + bisect_left(cut.keep, end) for end in candidates) if cut.keep else (base, base)
        groups.append(Group(part.rows, diagonal, cut.prefixes(rank, cut.region(part)), kept, documents))
    return LocalGeometry((whole,) * (documents + 1), g.block, g.step, g.initial, g.window, tuple(groups))


def position_geometry(cut: Cut, rank: int) -> LocalGeometry:
    """A rank's parts as groups of local rows whose keys are named by position: what a reader of the plan wants to know."""
    parts = tuple(Group(p.rows, p.key, cut.region(p), cut.group(p).candidates, 0) for p in cut.parts[rank])
    g, rows = cut.geometry, cut.layout.length(rank)
    documents = (((0, rows), (0, cut.kv_layout.total)),)
    return LocalGeometry(documents, g.block, g.step, g.initial, g.window, parts)


def local_plan(
    geometry: Geometry,
    cut: Cut,
    rank: int,
    lines: Lines,
    share: str,
    shape: tuple[int, int, int],
    keep: Tensor | None = None,
) -> StripePlan:
    """The columns of each part and head, out of some lines that a rank has; `shape`: batch, query heads, key heads."""
    batch, q_heads, kv_heads = shape
    groups, each = cut.groups[rank], q_heads // kv_heads
    lists = 1 if share == "key" else each
    found = []
    for numbers, bits in lines.bits(len(groups) * each, batch * kv_heads):
        bits = bits.unflatten(0, (len(groups), each)).any(1) if share == "key" else bits
        here = lines.columns[numbers]
        found.append([here[row.nonzero()[:, 0]] for row in bits])
    nothing = lines.columns.new_empty(0)
    place = {number: index for index, number in enumerate(groups)}
    columns = [
        found[head][place[part.group] * lists + query] if part.group in place else nothing
        for part in cut.parts[rank]
        for head in range(batch * kv_heads)
        for query in range(lists)
    ]
    return StripePlan.of_columns(geometry, shape, share, columns, keep, "asked for").to(lines.columns.device)


def stacks(cut: Cut, rank: int, lines: Lines, shape: tuple[int, int, int]) -> Iterator[tuple[int, int, int, Tensor]]:
    """(group, batch entry, query head, numbers of the lines that are wanted there) of all lists that have some."""
    batch, q_heads, kv_heads = shape
    each = q_heads // kv_heads
    for head, (numbers, bits) in enumerate(lines.bits(len(cut.groups[rank]) * each, batch * kv_heads)):
        entry, key_head = divmod(head, kv_heads)
        for bit, row in enumerate(bits):
            found = numbers[row.nonzero()[:, 0]]
            if len(found):
                yield cut.groups[rank][bit // each], entry, key_head * each + bit % each, found


def positions_of(cut: Cut, wanted: Wanted) -> Tensor:
    """int64 (lines): the position of each line's row."""
    held = [cut.kv_layout.positions(owner) for owner in range(cut.world)]
    first = torch.tensor([0, *map(len, held)]).cumsum(0)[:-1]
    owners = torch.repeat_interleave(torch.arange(cut.world), torch.tensor(wanted.counts))
    return torch.cat(held)[first[owners] + wanted.rows.cpu()].to(wanted.rows.device)

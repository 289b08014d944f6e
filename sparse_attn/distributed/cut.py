"""How the groups of a sequence lie over ranks: whose rows belong to which group, and which keys a rank's anchor regions need.

    sequence     | group 0 | group 1 | group 2 | group 3 |
    ranks        |  rank 0    | rank 1       | rank 0    |      any layout of runs, cut inside groups or between them
    parts        |  0:0  |0:1 | 1:1 |  1:2   |0:2| 0:3   |      rank:group

A *part* is a run of neighbouring rows of one rank inside one group, whose own keys lie side by side on one rank, which is
another one only where keys are cut differently (rows on top of a spread cache). Its anchor region is the initial block, the
window before the group and the group's keys up to the diagonal; what of it lies on other ranks is the rank's *halo*. All of
this follows from geometry and layouts, so every rank knows it of every other and nothing has to be said.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from sparse_attn.geometry import Geometry, Group
from tokenring import Layout
from tokenring.plans.step import Piece
from tokenring.segments import Range, union


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring rows of one rank inside one group."""

    group: int
    rows: Range
    """Local rows."""
    start: int
    """The first one's number among the queries of the whole sequence."""
    key: int
    """The position of the first one's own key."""

    @property
    def count(self) -> int:
        return self.rows[1] - self.rows[0]


@dataclass(frozen=True)
class Cut:
    """A geometry over layouts of runs of neighbours; hashable."""

    geometry: Geometry
    layout: Layout
    """Of the queries, numbered from 0."""
    kv_layout: Layout
    """Of the keys and values, their positions from 0."""
    keep: tuple[int, ...] = ()
    """Ascending positions that belong to every later group's anchor region."""

    def __post_init__(self) -> None:
        for layout in (self.layout, self.kv_layout):
            self._check(layout)

    @staticmethod
    def _check(layout: Layout) -> None:
        if any(run.stride != 1 and run.count > 1 for rank in layout.runs for run in rank):
            raise ValueError(
                f"layout {layout.name} deals positions out one by one; groups share columns and want neighbouring rows: "
                "give a zigzag, contiguous or group layout (sparse_attn.distributed.group_layout), or Layout.striped(block=...)"
            )

    @property
    def world(self) -> int:
        return self.layout.world

    @cached_property
    def parts(self) -> tuple[tuple[Part, ...], ...]:
        """Of each rank, in local row order."""
        return tuple(tuple(self._parts(rank)) for rank in range(self.world))

    def _parts(self, rank: int) -> Iterator[Part]:
        groups, firsts, row = self.geometry.groups, self._first_rows, 0
        for run in self.layout.segments(rank):
            at, stop = run.start, run.start + run.count
            while at < stop:
                number = bisect_right(firsts, at) - 1
                group = groups[number]
                key = group.diagonal + at - group.rows[0]
                own = next(self.pieces((key, key + min(stop, group.rows[1]) - at)))
                yield Part(number, (row, row + own.rows), at, key)
                row, at = row + own.rows, at + own.rows

    @cached_property
    def _first_rows(self) -> list[int]:
        return [group.rows[0] for group in self.geometry.groups]

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """For each rank the groups it holds rows of that have candidates, ascending: a list's bits are in this order."""
        all_groups = self.geometry.groups
        return tuple(
            tuple(sorted({p.group for p in parts if all_groups[p.group].candidate_keys})) for parts in self.parts
        )

    @cached_property
    def holders(self) -> dict[int, list[int]]:
        """The ranks that hold rows of each group with candidates."""
        found: dict[int, list[int]] = {}
        for rank, groups in enumerate(self.groups):
            for number in groups:
                found.setdefault(number, []).append(rank)
        return found

    @cached_property
    def split(self) -> tuple[int, ...]:
        """The groups with candidates that several ranks hold rows of."""
        return tuple(sorted(number for number, ranks in self.holders.items() if len(ranks) > 1))

    @cached_property
    def shared(self) -> frozenset[int]:
        """The groups that have several parts, on one rank or on several."""
        counts = Counter(part.group for parts in self.parts for part in parts)
        return frozenset(number for number, count in counts.items() if count > 1)

    def base(self, rank: int) -> int:
        """Rows of the workspace [own rows, halo] of a rank."""
        return self.kv_layout.length(rank) + self.halo_rows(rank)

    def group(self, part: Part) -> Group:
        return self.geometry.groups[part.group]

    # -- rows of keys by position --------------------------------------------------------------------------------------

    @cached_property
    def _held(self) -> list[list[tuple[int, int, int]]]:
        """Of each rank (first position, past the last, local row of its keys), ascending."""
        found = []
        for rank in range(self.world):
            row, runs = 0, []
            for run in self.kv_layout.segments(rank):
                runs.append((run.start, run.start + run.count, row))
                row += run.count
            found.append(sorted(runs))
        return found

    @cached_property
    def _owners(self) -> list[tuple[int, int, int, int]]:
        """(first position, past the last, rank, local row) of all runs, ascending."""
        return sorted((a, b, rank, row) for rank, runs in enumerate(self._held) for a, b, row in runs)

    def pieces(self, span: Range) -> Iterator[Piece]:
        """The rows of keys of all ranks that hold the positions of a span, in order of position."""
        owners = self._owners
        for index in range(max(0, bisect_right(owners, (span[0], 1 << 62)) - 1), len(owners)):
            a, b, rank, row = owners[index]
            if a >= span[1]:
                return
            first, last = max(a, span[0]), min(b, span[1])
            if first < last:
                yield Piece(rank, row + first - a, row + last - a)

    def owned(self, rank: int, span: Range) -> list[Range]:
        """The local rows of keys of one rank that hold positions of a span, neighbours joined, in order of position."""
        found: list[Range] = []
        for a, b, row in self._held[rank]:
            first, last = max(a, span[0]), min(b, span[1])
            if first < last:
                start = row + first - a
                if found and found[-1][1] == start:
                    start = found.pop()[0]
                found.append((start, row + last - a))
        return found

    @cached_property
    def candidates(self) -> list[dict[int, list[Range]]]:
        """For each rank and group: the local rows that are candidates of the group; groups with none are left out."""
        found: list[dict[int, list[Range]]] = []
        for rank in range(self.world):
            spans = {number: self.owned(rank, self.geometry.groups[number].candidates) for number in self.holders}
            found.append({number: rows for number, rows in spans.items() if rows})
        return found

    # -- anchor regions ------------------------------------------------------------------------------------------------

    def region(self, part: Part) -> tuple[Range, ...]:
        """Positions that every row of a part sees beside its own and those to keep: initial block, window, and the group's
        keys before the part."""
        group = self.group(part)
        return union([*group.prefix, (group.diagonal, part.key)])

    def diagonal(self, rank: int, part: Part) -> int:
        """The row of the workspace [own rows, halo] that holds the own key of a part's first row; the others follow it."""
        ((row, _),) = self.prefixes(rank, [(part.key, part.key + part.count)])
        return row

    def kept(self, rank: int) -> tuple[int, ...]:
        """The positions of `keep` that precede the window of some group of a rank."""
        edge = max((self.group(part).candidates[1] for part in self.parts[rank]), default=0)
        return self.keep[: bisect_left(self.keep, edge)]

    @cached_property
    def halos(self) -> tuple[tuple[Piece, ...], ...]:
        """For each rank the rows of others that its anchor regions need, in order of position."""
        return tuple(self._halo(rank) for rank in range(self.world))

    def _halo(self, rank: int) -> tuple[Piece, ...]:
        regions = [span for part in self.parts[rank] for span in self.region(part)]
        own = [(part.key, part.key + part.count) for part in self.parts[rank]]
        spans = union([*regions, *own, *((row, row + 1) for row in self.kept(rank))])
        return tuple(piece for span in spans for piece in self.pieces(span) if piece.owner != rank)

    def prefixes(self, rank: int, spans: Iterable[Range]) -> tuple[Range, ...]:
        """Rows of the workspace [own rows, halo] that hold the positions of some spans, in order; neighbours joined."""
        found: list[Range] = []
        for span in spans:
            for piece in self.pieces(span):
                start = piece.start if piece.owner == rank else self._halo_row(rank, piece)
                stop = start + piece.rows
                if found and found[-1][1] == start:
                    start = found.pop()[0]
                found.append((start, stop))
        return tuple(found)

    def _halo_row(self, rank: int, wanted: Piece) -> int:
        for row, piece in self._halo_rows[rank].get(wanted.owner, ()):
            if piece.start <= wanted.start and wanted.stop <= piece.stop:
                return row + wanted.start - piece.start
        raise AssertionError(f"rank {rank} has no {wanted} in its halo")

    @cached_property
    def _halo_rows(self) -> list[dict[int, list[tuple[int, Piece]]]]:
        """For each rank and owner: (row of the workspace, piece)."""
        found: list[dict[int, list[tuple[int, Piece]]]] = []
        for rank, halo in enumerate(self.halos):
            row, here = self.kv_layout.length(rank), {}
            for piece in halo:
                here.setdefault(piece.owner, []).append((row, piece))
                row += piece.rows
            found.append(here)
        return found

    def near(self, rank: int, owner: int) -> Tensor:
        """int64 (rows of the owner): where a rank's [own rows, halo] has them; -1 for those it has not."""
        if rank == owner:
            return torch.arange(self.kv_layout.length(rank))
        found = torch.full((self.kv_layout.length(owner),), -1, dtype=torch.int64)
        for row, piece in self._halo_rows[rank].get(owner, ()):
            found[piece.start : piece.stop] = torch.arange(row, row + piece.rows)
        return found

    def halo_rows(self, rank: int) -> int:
        """How many rows of others a rank's anchor regions need."""
        return sum(piece.rows for piece in self.halos[rank])

    # -- work ----------------------------------------------------------------------------------------------------------

    def anchor_pairs(self, rank: int) -> float:
        """Pairs of one head and batch entry that a rank computes in anchor regions."""
        return sum(p.count * (self._seen(p) + (p.count + 1) / 2) for p in self.parts[rank])

    def _seen(self, part: Part) -> int:
        """Keys before a part in its anchor region."""
        kept = [bisect_left(self.keep, end) for end in self.group(part).candidates]
        return sum(b - a for a, b in self.region(part)) + kept[1] - kept[0]

    def candidate_pairs(self, rank: int) -> int:
        """Pairs of one head and batch entry that a rank's stripes choose from."""
        return sum(p.count * self.group(p).candidate_keys for p in self.parts[rank])


@lru_cache(maxsize=64)
def cut_of(geometry: Geometry, layout: Layout, kv_layout: Layout, keep: tuple[int, ...]) -> Cut:
    """`Cut`, made once for calls that are alike, such as those of a model's layers."""
    return Cut(geometry, layout, kv_layout, keep)


def rows_of(ranges: Iterable[Range], device: torch.device | None = None) -> Tensor:
    """int64: the numbers of half-open ranges, in order."""
    parts = [torch.arange(a, b, device=device) for a, b in ranges]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)

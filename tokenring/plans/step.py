"""What a schedule is made of: slots, transfers, computes, sums, steps. Immutable data, the same on every rank.

One step of one rank, in order:

    lane 0     what the *next* step computes on travels while this step computes      (keys and values, or queries)
    lane 2     what a later step needs, several steps ahead                           (between nodes)
    compute    tiles of a query slot against a key slot give partial results
    sums       partials over the same rows, made here or just arrived, become one
    lane 1     partials made here for other ranks leave                               (out and lse, dq, dk and dv)
    merge      partials of this rank's own rows join its result

A transfer appears at the same (step, lane) on both of its ends. Rows are named by pieces, runs of one owner's local rows, so
a slot can hold what several ranks sent, and its tiles may span them. Heads are counted in the kind of the slot: query heads
for queries and their results, key heads for keys, values and theirs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from tokenring.segments import Range, Tile

PAYLOAD_LANE, RETURN_LANE, AHEAD_LANE = LANES = (0, 1, 2)

END = 1 << 62
"""Past every row."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows start..stop-1 of the shard of rank `owner`."""

    owner: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Slot:
    """Rows that a rank holds under one name.

    what: "q", "kv" (k and v), "out" (a partial out and lse); backward "qd" (q, do, lse, delta), "dq" and "dkv" (partial
    gradients). heads: a range of heads; None for all.
    """

    name: str
    what: str
    pieces: tuple[Piece, ...]
    heads: Range | None = None

    @property
    def rows(self) -> int:
        return sum(p.rows for p in self.pieces)

    def locate(self, wanted: Iterable[Piece]) -> tuple[Range, ...]:
        """Where the rows of some pieces lie in this slot, in the order of those pieces; neighbours joined."""
        return Located(self).rows(wanted)


class Located:
    """Where the rows of a slot lie, sorted out once for many questions."""

    def __init__(self, slot: Slot) -> None:
        self.name = slot.name
        self.held: dict[int, list[tuple[int, int, int]]] = {}
        """For each owner (first row there, past the last, first row here), in the order of the owner's rows."""
        row = 0
        for piece in slot.pieces:
            self.held.setdefault(piece.owner, []).append((piece.start, piece.stop, row))
            row += piece.rows
        for runs in self.held.values():
            runs.sort()

    def rows(self, wanted: Iterable[Piece]) -> tuple[Range, ...]:
        """`Slot.locate`."""
        found: list[Range] = []
        for piece in wanted:
            at = piece.start
            while at < piece.stop:
                first, last = self._run(self.held.get(piece.owner, ()), piece.owner, at, piece.stop)
                at += last - first
                if found and found[-1][1] == first:
                    first = found.pop()[0]
                found.append((first, last))
        return tuple(found)

    def _run(self, runs: Sequence[tuple[int, int, int]], owner: int, start: int, stop: int) -> Range:
        index = bisect_right(runs, (start, END, END)) - 1
        if index < 0 or runs[index][1] <= start:
            raise ValueError(f"slot {self.name} does not hold row {start} of rank {owner}")
        first = runs[index][2] + start - runs[index][0]
        return first, first + min(stop, runs[index][1]) - start


@dataclass(frozen=True, slots=True)
class Transfer:
    """Pieces of one slot of the source, all heads or some, that arrive in a slot of the destination."""

    source: int
    destination: int
    what: str
    pieces: tuple[Piece, ...]
    source_slot: str
    destination_slot: str
    heads: Range | None = None

    @property
    def rows(self) -> int:
        return sum(p.rows for p in self.pieces)


@dataclass(frozen=True, slots=True)
class Compute:
    """Tiles of a query slot against a key slot, and the partials they give.

    `results` holds the partial of exactly those query rows that have a tile ("out", backward "dq"), then, backward only, that
    of exactly those key rows that have one ("dkv"). heads: these query heads and the key heads they belong to; None for all.
    They are heads of one key head, or whole groups.
    """

    q: str
    kv: str
    results: tuple[Slot, ...]
    tiles: tuple[Tile, ...]
    heads: Range | None = None


@dataclass(frozen=True, slots=True)
class Sum:
    """Partials over rows of `target` become one, in the order of `sources`: out and lse by online softmax, gradients added."""

    target: Slot
    sources: tuple[str, ...]


Exchange = tuple[tuple[Transfer, ...], ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank does in one step. `sends[lane]`, `receives[lane]`; `slots` are those that receives and copies fill.

    copies: transfers from this rank to itself, done before anything is computed; merges: slots of own rows.
    """

    sends: Exchange = ((), (), ())
    receives: Exchange = ((), (), ())
    slots: tuple[Slot, ...] = ()
    copies: tuple[Transfer, ...] = ()
    computes: tuple[Compute, ...] = ()
    sums: tuple[Sum, ...] = ()
    merges: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.sends) <= len(LANES) and len(self.receives) <= len(LANES)
        missing = ((),) * len(LANES)
        object.__setattr__(self, "sends", (*self.sends, *missing)[: len(LANES)])
        object.__setattr__(self, "receives", (*self.receives, *missing)[: len(LANES)])

    def moves(self, lane: int) -> bool:
        """Whether anything leaves or comes on a lane."""
        return bool(self.sends[lane] or self.receives[lane])


def pieces(owner: int, ranges: Iterable[Range]) -> tuple[Piece, ...]:
    """Row ranges of one owner, as pieces."""
    return tuple(Piece(owner, start, stop) for start, stop in ranges if start < stop)


def cut(slot: Slot, rows: Iterable[Range]) -> tuple[Piece, ...]:
    """The pieces of some rows of a slot."""
    result: list[Piece] = []
    first_rows = list(accumulate((piece.rows for piece in slot.pieces), initial=0))
    for start, stop in rows:
        for index in range(max(0, bisect_right(first_rows, start) - 1), bisect_left(first_rows, stop)):
            piece, row = slot.pieces[index], first_rows[index]
            first, last = max(start, row), min(stop, row + piece.rows)
            if first < last:
                result.append(Piece(piece.owner, piece.start + first - row, piece.start + last - row))
    return tuple(result)

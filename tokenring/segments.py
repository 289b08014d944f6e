"""Runs of positions, and the rectangles that a mask cuts out of two of them.

A rank's rows are a short list of affine runs: row `i` of a run holds global position `start + i * stride`. A mask that
bounds `key position - query position` from below and above therefore becomes, for a pair of runs of one stride, a *band*
on `key row - query row`. A `Tile` is such a rectangle of rows with a band: full, causal, strict and window are all bands.

      key rows ->        full          upper = 0        lower = -1, upper = 0
    query rows  |       # # # #         # . . .          # . . .
                v       # # # #         # # . .          # # . .
                        # # # #         # # # .          . # # .
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

Range = tuple[int, int]
"""Half-open rows (start, stop)."""

Bounds = tuple[int, int, int, int, int | None, int | None]
"""Of a tile: query rows, key rows, and the band."""


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` rows; row i holds position `start + i * stride`."""

    start: int
    count: int
    stride: int = 1

    @property
    def last(self) -> int:
        """The position of the last row."""
        return self.start + (self.count - 1) * self.stride

    def cut(self, first: int, last: int) -> Segment:
        """Rows first..last-1 of this run."""
        return (
            self if last - first == self.count else Segment(self.start + first * self.stride, last - first, self.stride)
        )

    def inside(self, start: int, stop: int) -> Range:
        """The rows whose positions lie in start..stop-1."""
        first = max(0, -((self.start - start) // self.stride))
        last = min(self.count, -((self.start - stop) // self.stride))
        return (first, last) if first < last else (0, 0)


@dataclass(frozen=True, slots=True)
class Tile:
    """Query rows x key rows of two slots; a pair counts if lower <= key row - query row <= upper (None: no bound).

    Rows are those of the slots, not of the tile, so a band keeps its bounds when a tile is cut or joined. `batch`: only these
    batch entries; None for all.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    lower: int | None = None
    upper: int | None = None
    batch: Range | None = None

    def pairs(self) -> int:
        """How many (query, key) pairs the tile holds, in one batch entry or in those of `batch`."""
        below = self._pairs_below(self.upper) if self.upper is not None else self._all()
        pairs = max(0, below - (self._pairs_below(self.lower - 1) if self.lower is not None else 0))
        return pairs if self.batch is None else pairs * (self.batch[1] - self.batch[0])

    def _all(self) -> int:
        return (self.q_stop - self.q_start) * (self.k_stop - self.k_start)

    def _pairs_below(self, bound: int) -> int:
        """Pairs with key row - query row <= bound: a sum of clamped consecutive integers, in closed form."""
        keys = self.k_stop - self.k_start
        first = self.q_start + bound + 1 - self.k_start

        def below(x: int) -> int:
            inside = min(max(x, 0), keys)
            return inside * (inside - 1) // 2 + (x - keys) * keys * (x > keys)

        return below(first + self.q_stop - self.q_start) - below(first)

    def trim(self) -> Tile | None:
        """The smallest tile with the same pairs, bounds that bind nothing removed; None if there are none.

        >>> Tile(0, 4, 2, 9, upper=0).trim()
        Tile(q_start=2, q_stop=4, k_start=2, k_stop=4, lower=None, upper=0, batch=None)
        """
        tight = _tight(self.q_start, self.q_stop, self.k_start, self.k_stop, self.lower, self.upper)
        return None if tight is None else self if tight == self.bounds else Tile(*tight, self.batch)

    @property
    def bounds(self) -> Bounds:
        """The rectangle and the band."""
        return self.q_start, self.q_stop, self.k_start, self.k_stop, self.lower, self.upper

    def common(self, other: Tile) -> Tile | None:
        """The pairs of both; None if there are none."""
        batch = self.batch or other.batch
        if self.batch and other.batch:
            batch = (max(self.batch[0], other.batch[0]), min(self.batch[1], other.batch[1]))
            if batch[0] >= batch[1]:
                return None
        q_start, q_stop = max(self.q_start, other.q_start), min(self.q_stop, other.q_stop)
        k_start, k_stop = max(self.k_start, other.k_start), min(self.k_stop, other.k_stop)
        if q_start >= q_stop or k_start >= k_stop:
            return None
        lower, upper = self.lower, self.upper
        if lower is None or (other.lower is not None and other.lower > lower):
            lower = other.lower
        if upper is None or (other.upper is not None and other.upper < upper):
            upper = other.upper
        return trimmed(q_start, q_stop, k_start, k_stop, lower, upper, batch)

    def spans(self, rows: Range, keys: Range) -> bool:
        """Whether the tile's rectangle is just these rows and keys."""
        return (self.q_start, self.q_stop, self.k_start, self.k_stop) == (*rows, *keys)

    def of(self, batch: Range | None) -> Tile:
        """The same tile of some batch entries."""
        return self if batch is None else Tile(*self.bounds, batch)

    def shift(self, q_rows: int, k_rows: int) -> Tile:
        """The same tile where its query rows lie `q_rows` further on and its key rows `k_rows`."""
        move = k_rows - q_rows
        return Tile(
            self.q_start + q_rows,
            self.q_stop + q_rows,
            self.k_start + k_rows,
            self.k_stop + k_rows,
            None if self.lower is None else self.lower + move,
            None if self.upper is None else self.upper + move,
            self.batch,
        )


def trimmed(
    q_start: int,
    q_stop: int,
    k_start: int,
    k_stop: int,
    lower: int | None,
    upper: int | None,
    batch: Range | None = None,
) -> Tile | None:
    """`Tile(...).trim()`."""
    tight = _tight(q_start, q_stop, k_start, k_stop, lower, upper)
    return None if tight is None else Tile(*tight, batch)


def _tight(q0: int, q1: int, k0: int, k1: int, lower: int | None, upper: int | None) -> Bounds | None:
    for _ in range(2):
        if upper is not None:
            q0, k1 = max(q0, k0 - upper), min(k1, q1 + upper)
        if lower is not None:
            q1, k0 = min(q1, k1 - lower), max(k0, q0 + lower)
    if q0 >= q1 or k0 >= k1 or (lower is not None and upper is not None and lower > upper):
        return None
    if upper is not None and k1 - 1 - q0 <= upper:
        upper = None
    if lower is not None and k0 - (q1 - 1) >= lower:
        lower = None
    return q0, q1, k0, k1, lower, upper


def row_band(q: Segment, k: Segment, lower: int | None, upper: int | None) -> tuple[int | None, int | None]:
    """Bounds on key row - query row of two runs of one stride under lower <= key position - query position <= upper."""
    assert q.stride == k.stride
    offset = q.start - k.start
    low = None if lower is None else -((-(lower + offset)) // q.stride)
    high = None if upper is None else (upper + offset) // q.stride
    return low, high


def band_tile(q: Segment, k: Segment, lower: int | None, upper: int | None) -> Tile | None:
    """The tile of two runs of one stride under lower <= key position - query position <= upper."""
    return trimmed(0, q.count, 0, k.count, *row_band(q, k, lower, upper))


def join(segments: Iterable[Segment]) -> list[Segment]:
    """Neighbouring runs that continue each other, as one."""
    joined: list[Segment] = []
    for segment in segments:
        if segment.count == 0:
            continue
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.stride == segment.stride
            and segment.start == last.start + last.count * last.stride
        ):
            joined[-1] = Segment(last.start, last.count + segment.count, last.stride)
        else:
            joined.append(segment)
    return joined


def fuse(tiles: Iterable[Tile]) -> tuple[Tile, ...]:
    """Join tiles that are one tile with the same pairs: along keys first, then along queries.

    Two chunks of a zigzag rank, causal against themselves (three tiles), are one causal tile:

    >>> fuse([Tile(0, 2, 0, 2, upper=0), Tile(2, 4, 0, 2), Tile(2, 4, 2, 4, upper=0)])
    (Tile(q_start=0, q_stop=4, k_start=0, k_stop=4, lower=None, upper=0, batch=None),)
    """
    by_keys = _joined(sorted(tiles, key=lambda t: (t.batch or (0, 0), t.q_start, t.q_stop, t.k_start)), _along_keys)
    return tuple(_joined(sorted(by_keys, key=lambda t: (t.batch or (0, 0), t.k_start, t.q_start)), _along_queries))


def _joined(tiles: list[Tile], join_pair: Callable[[Tile, Tile], Tile | None]) -> list[Tile]:
    result: list[Tile] = []
    for tile in tiles:
        hull = join_pair(result[-1], tile) if result else None
        if hull is not None:
            result[-1] = hull
        else:
            result.append(tile)
    return result


def _along_keys(a: Tile, b: Tile) -> Tile | None:
    if (a.q_start, a.q_stop, a.k_stop, a.batch) != (b.q_start, b.q_stop, b.k_start, b.batch):
        return None
    q, k_start, k_stop = (a.q_start, a.q_stop), a.k_start, b.k_stop
    for lower, upper in _bands(a, b):
        if (
            _tight(*q, k_start, a.k_stop, lower, upper) == a.bounds
            and _tight(*q, b.k_start, k_stop, lower, upper) == b.bounds
        ):
            return Tile(*q, k_start, k_stop, lower, upper, a.batch)
    return None


def _along_queries(a: Tile, b: Tile) -> Tile | None:
    if (a.q_stop, a.batch) != (b.q_start, b.batch):
        return None
    k = min(a.k_start, b.k_start), max(a.k_stop, b.k_stop)
    for lower, upper in _bands(a, b):
        if (
            _tight(a.q_start, a.q_stop, *k, lower, upper) == a.bounds
            and _tight(b.q_start, b.q_stop, *k, lower, upper) == b.bounds
        ):
            return Tile(a.q_start, b.q_stop, *k, lower, upper, a.batch)
    return None


def _bands(a: Tile, b: Tile) -> Iterator[tuple[int | None, int | None]]:
    """Every band whose bounds are those of one of them."""
    for lower in (a.lower,) if a.lower == b.lower else (a.lower, b.lower):
        for upper in (a.upper,) if a.upper == b.upper else (a.upper, b.upper):
            yield lower, upper


def union(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Sorted disjoint ranges that cover the same rows.

    >>> union([(4, 6), (0, 2), (1, 4)])
    ((0, 6),)
    """
    result: list[Range] = []
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return tuple(result)


def rows_in(ranges: Iterable[Range]) -> int:
    """How many rows the ranges hold."""
    return sum(stop - start for start, stop in ranges)

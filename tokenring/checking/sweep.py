"""Do some tiles share a pair? A sweep over query rows that compares neighbours only.

In each row a tile is one interval of keys, and no two of them change places from one row to the next unless they meet. So
tiles are pairwise disjoint if each is disjoint of its two neighbours whenever neighbours change:

    row 3      [a a a]  [b b]      [c c c c]
    row 4        [a a a]  [b b]    [c c c c]     b ends after this row: a and c become neighbours, and are compared
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenring.segments import Tile


def first_overlap(tiles: Iterable[Tile]) -> tuple[Tile, Tile] | None:
    """Two of some trimmed tiles, of the same batch entries, that share a pair; None if no two do.

    >>> first_overlap([Tile(0, 4, 0, 4, upper=0), Tile(0, 4, 1, 4, lower=1)])
    >>> first_overlap([Tile(0, 2, 0, 2), Tile(1, 3, 1, 3)])[0]
    Tile(q_start=0, q_stop=2, k_start=0, k_stop=2, lower=None, upper=None, batch=None)
    """
    listed = list(tiles)
    # At one row, what ends before it goes before what begins with it comes.
    events = sorted(
        (*((t.q_stop, 0, i) for i, t in enumerate(listed)), *((t.q_start, 1, i) for i, t in enumerate(listed)))
    )
    active: list[Tile] = []
    for row, begins, which in events:
        tile = listed[which]
        if begins:
            at = _place(active, row, tile)
            active.insert(at, tile)
            pairs = ((at - 1, at), (at, at + 1))
        else:
            at = _place(active, row - 1, tile) - 1
            del active[at]
            pairs = ((at - 1, at),)
        for left, right in pairs:
            if left >= 0 and right < len(active) and active[left].common(active[right]) is not None:
                return active[left], active[right]
    return None


def _first_key(tile: Tile, row: int) -> int:
    return tile.k_start if tile.lower is None else max(tile.k_start, row + tile.lower)


def _place(active: Sequence[Tile], row: int, tile: Tile) -> int:
    """How many of the active tiles begin no later than this one in a row."""
    wanted, low, high = _first_key(tile, row), 0, len(active)
    while low < high:
        middle = (low + high) // 2
        if _first_key(active[middle], row) <= wanted:
            low = middle + 1
        else:
            high = middle
    return low

"""Who holds the next tokens of a sequence whose cache is spread over ranks: pure functions of layouts, so that every rank
works out the same without a message.

A chunk is dealt so that afterwards all ranks hold equally many rows, within one, or as near to it as the chunk can bring
them. A rank takes its share in two runs, one from each end, so that attention of the chunk to itself costs every rank alike:

    held 4 4 3, a chunk of 7      shares 2 2 3      rank 0: 0 . . . . . 6     rank 1: . 1 . . . 5 .     rank 2: . . 2 3 4 . .

Tokens dealt one at a time go to the rank that holds the fewest rows, the lowest of several; a rank's single tokens become
one run with a stride, so a layout stays short however long decoding goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from tokenring.layout import Layout
from tokenring.segments import Segment

_KEPT = 256
"""Layouts that are remembered: all layers of a model ask for the same."""


def deal(held: Sequence[int], count: int, *, offset: int = 0, at_least: int = 0) -> Layout:
    """The next `count` positions, from `offset` on, over ranks that hold `held` rows.

    Args:
        held: rows that each rank holds.
        at_least: rows of the chunk that every rank takes, however many it holds already.

    >>> [deal([4, 4, 3], 7, offset=11).positions(rank).tolist() for rank in range(3)]
    [[11, 17], [12, 16], [13, 14, 15]]
    """
    if count < 0 or offset < 0 or not held or min(held) < 0:
        raise ValueError(
            f"deal got count={count}, offset={offset}, held={list(held)}; give 0 or more of each, and one number for each rank"
        )
    if not 0 <= at_least * len(held) <= count:
        raise ValueError(
            f"deal got {count} tokens and at_least={at_least} for each of {len(held)} ranks; "
            f"give {at_least * len(held)} tokens or more, or a smaller at_least"
        )
    return _dealt(tuple(held), count, offset, at_least)


@lru_cache(maxsize=_KEPT)
def _dealt(held: tuple[int, ...], count: int, offset: int, at_least: int) -> Layout:
    shares = [at_least + more for more in _shares([h + at_least for h in held], count - at_least * len(held))]
    runs: list[list[Segment]] = [[] for _ in held]
    start = 0
    halves = [(rank, -(-share // 2)) for rank, share in enumerate(shares)]
    halves += [(rank, shares[rank] // 2) for rank in reversed(range(len(held)))]
    for rank, rows in halves:
        runs[rank].append(Segment(start, rows))
        start += rows
    return Layout.from_runs(runs).at(offset)


def _shares(held: Sequence[int], count: int) -> list[int]:
    """How many of `count` new rows each rank takes: the lowest are filled to one level, what is left goes to the first of them."""
    order = sorted(range(len(held)), key=lambda rank: held[rank])
    below, filled = 0, 0
    for filled, rank in enumerate(order, start=1):
        below += held[rank]
        above = held[order[filled]] if filled < len(order) else None
        if above is None or above * filled - below >= count:
            break
    level, more = divmod(below + count, filled)
    shares = [max(0, level - h) for h in held]
    for rank in sorted(order[:filled])[:more]:
        shares[rank] += 1
    return shares


@lru_cache(maxsize=_KEPT)
def joined(whole: Layout, chunk: Layout) -> Layout:
    """A layout and the chunk that follows it, as one; a rank's rows of the chunk lie behind those it has.

    >>> joined(Layout.contiguous(3, 2), deal([2, 1], 3, offset=3)).positions(1).tolist()
    [2, 4, 5]
    """
    if chunk.world != whole.world or chunk.offset != whole.offset + whole.total:
        raise ValueError(
            f"a chunk from position {chunk.offset} on over {chunk.world} ranks cannot follow {whole.total} positions from "
            f"{whole.offset} on over {whole.world} ranks; the next position is {whole.offset + whole.total}"
        )
    runs = [_grown(whole.segments(rank), chunk.segments(rank)) for rank in range(whole.world)]
    return _layout(runs, whole.offset)


@lru_cache(maxsize=_KEPT)
def between(layout: Layout, start: int, stop: int) -> Layout:
    """What is left of a layout when only positions start..stop-1 are kept, in the same local order.

    >>> between(Layout.zigzag(8, 2), 3, 7).positions(0).tolist()
    [6]
    """
    start = max(start, layout.offset)
    kept = [
        [run.cut(*run.inside(start, stop)) for run in layout.segments(rank)] if start < stop else []
        for rank in range(layout.world)
    ]
    return _layout(kept, start)


@lru_cache(maxsize=_KEPT)
def compacted(layout: Layout, since: int) -> Layout:
    """The same rows, with all positions before `since` handed out anew as one run a rank.

    Attention is the same under any mask that lets queries from `since` on see all of these keys, as causal does; planning
    takes as long as there are runs, and every chunk leaves two.

    >>> compacted(joined(Layout.zigzag(8, 2), deal([4, 4], 2, offset=8)), 8).positions(1).tolist()
    [4, 5, 6, 7, 9]
    """
    start, runs = layout.offset, []
    for rank in range(layout.world):
        count, later = 0, []
        for run in layout.segments(rank):
            _, last = run.inside(layout.offset, since)
            if last and later:
                return layout  # older rows behind newer ones
            count += last
            later += [run.cut(last, run.count)] if last < run.count else []
        runs.append([Segment(start, count), *later])
        start += count
    return _layout(runs, layout.offset)


def _layout(runs: Iterable[Iterable[Segment]], offset: int) -> Layout:
    from_zero = [[replace(s, start=s.start - offset) for s in rank if s.count] for rank in runs]
    return Layout.from_runs(from_zero).at(offset)


def _grown(runs: Sequence[Segment], more: Iterable[Segment]) -> list[Segment]:
    """Runs with others behind them; single rows continue the run before them at its stride, or give it one."""
    grown = list(runs)
    for run in more:
        last = grown[-1] if grown else None
        if last is None or run.count != 1 or run.start <= last.last:
            grown.append(run)
        elif last.count == 1:
            grown[-1] = Segment(last.start, 2, run.start - last.start)
        elif run.start == last.last + last.stride:
            grown[-1] = replace(last, count=last.count + 1)
        else:
            grown.append(run)
    return grown

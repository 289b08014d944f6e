"""Cuts of a sequence that suit stripes: whole groups on a rank, early ones with late ones.

    groups     0 1 | 2 3 | 4 5 | 6 7 | 8 9 | 10 11          two ranks' worth of chunks each: zigzag over groups
    ranks       0     1     2     2     1      0

A later group has more candidates, and its owner's keys are wanted by fewer: rank r takes chunks r and 2N-1-r, which evens both.
"""

from __future__ import annotations

from itertools import pairwise

from sparse_attn.config import AnchorConfig
from sparse_attn.cost import resolved
from tokenring import Layout
from tokenring.segments import Segment

EVEN = 1.05
"""Largest over mean, of rows and of causal pairs, up to which whole groups are dealt out."""


def group_layout(length: int, world: int, config: AnchorConfig | None = None) -> Layout:
    """A zigzag of 2N chunks that end where groups end, where that leaves ranks even; else where blocks end, else anywhere.

    Any layout gives the same result. A group that lies on two ranks sends what it wants to both, so this one sends least.

    Args:
        length: positions of the whole sequence.
        config: what `anchor_attention` will be given.

    >>> layout = group_layout(65536, 4, AnchorConfig(block=128, step=8))
    >>> [(run.start, run.count) for run in layout.segments(1)]
    [(8192, 8192), (49152, 8192)]
    """
    if length < 0 or world < 1:
        raise ValueError(
            f"group_layout got length={length}, world={world}; give a length of 0 or more and one rank or more"
        )
    block, step = resolved(AnchorConfig() if config is None else config, length)
    found = [_zigzag(length, world, unit) for unit in (block * step, block, 1)]
    return next((layout for layout in found if unevenness(layout) <= EVEN), found[-1])


def neighbouring(layout: Layout) -> Layout:
    """The same rows from position 0, in runs of neighbours: tokens that were dealt one at a time become runs of one.

    >>> strided = Layout.from_runs([[Segment(0, 3), Segment(4, 2, 2)], [Segment(3, 2, 2), Segment(7, 1)]])
    >>> [(run.start, run.count) for run in neighbouring(strided).segments(0)]
    [(0, 3), (4, 1), (6, 1)]
    """
    layout = layout.at(0)
    if all(run.stride == 1 or run.count < 2 for runs in layout.runs for run in runs):
        return layout
    return Layout.of_any_runs([[part for run in runs for part in _neighbours(run)] for runs in layout.runs])


def _neighbours(run: Segment) -> list[Segment]:
    return [run] if run.stride == 1 else [Segment(start, 1) for start in range(run.start, run.last + 1, run.stride)]


def unevenness(layout: Layout) -> float:
    """Largest over mean of the ranks' rows, or of their causal pairs if that is worse."""
    rows = [layout.length(rank) for rank in range(layout.world)]
    runs = [layout.segments(rank) for rank in range(layout.world)]
    pairs = [sum(run.count * (run.start + run.last + 2) / 2 for run in mine) for mine in runs]
    return max(max(work) * layout.world / max(1, sum(work)) for work in (rows, pairs))


def _zigzag(length: int, world: int, unit: int) -> Layout:
    units, chunks = -(-length // unit), 2 * world
    cuts = [min(length, units * chunk // chunks * unit) for chunk in range(chunks)] + [length]
    runs = [Segment(a, b - a) for a, b in pairwise(cuts)]
    pairs = ([runs[rank], runs[chunks - 1 - rank]] for rank in range(world))
    return Layout.from_runs([[run for run in pair if run.count] for pair in pairs])

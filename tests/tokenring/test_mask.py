"""Masks cut to tiles: exactly the allowed pairs, and few tiles however a layout is striped."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import settings as with_settings
from hypothesis import strategies as st

import tokenring as tr
from tokenring.segments import Segment

BOUND = st.none() | st.integers(-9, 9)
RUNS = st.lists(st.builds(Segment, st.integers(0, 30), st.integers(0, 6), st.integers(1, 4)), max_size=4)


def positions(runs: list[Segment]) -> torch.Tensor:
    return torch.tensor([r.start + i * r.stride for r in runs for i in range(r.count)], dtype=torch.int64)


@given(RUNS, RUNS, BOUND, BOUND)
@with_settings(max_examples=400)
def test_tiles_hold_every_allowed_pair_once(q: list, k: list, lower: int | None, upper: int | None) -> None:
    mask = tr.Mask.band(lower, upper)
    allowed = mask.dense(positions(q), positions(k))
    found = torch.zeros_like(allowed, dtype=torch.int64)
    for tile in mask.tiles(q, k):
        assert tile.trim() == tile
        rows, keys = torch.arange(tile.q_start, tile.q_stop), torch.arange(tile.k_start, tile.k_stop)
        inside = tr.Mask.band(tile.lower, tile.upper).dense(rows, keys)
        found[tile.q_start : tile.q_stop, tile.k_start : tile.k_stop] += inside
    assert torch.equal(found, allowed.long())


def test_tiles_are_as_many_as_runs_and_not_their_square() -> None:
    blocks = tr.Layout.striped(1 << 17, 8, block=16)
    runs = len(blocks.segments(3))
    assert len(tr.Mask.causal().tiles(blocks.segments(3), blocks.segments(2))) <= runs == 1024
    assert len(tr.Mask.full().tiles(blocks.segments(3), tr.Layout.striped(1 << 17, 8).segments(2))) == 1


def test_only_rows_that_a_band_cuts_fall_apart_where_strides_differ() -> None:
    striped, contiguous = tr.Layout.striped(800, 8), tr.Layout.contiguous(800, 8)
    tiles = tr.Mask.causal().tiles(striped.segments(3), contiguous.segments(2))
    assert len(tiles) <= 100 // 8 + 2


def test_layouts_with_one_hash_are_still_compared_by_their_runs() -> None:
    one, other = (
        tr.Layout(4, 2, 0, ((Segment(0, 2),), (Segment(2, 2),)), "own"),
        tr.Layout(4, 2, 0, ((Segment(0, 1),), (Segment(1, 3),)), "own"),
    )
    assert hash(one) == hash(other) and one != other and len({one, other}) == 2

"""Masks cut to tiles: exactly the allowed pairs, and few tiles however a layout is striped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
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


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.data())
@with_settings(max_examples=200)
def test_runs_that_lie_among_each_other_are_cut_right(
    length: int, q_step: int, k_step: int, data: st.DataObject
) -> None:
    """A workspace of what several ranks of a striped layout sent, under documents that cut it anywhere."""
    q, k = (
        [Segment(start, len(range(start, length, step)), step) for start in range(min(step, length))]
        for step in (q_step, k_step)
    )
    inner = data.draw(st.lists(st.integers(0, length), max_size=5))
    mask = tr.Mask.documents([0, *sorted(inner), length]) & data.draw(
        st.sampled_from([tr.Mask.full(), tr.Mask.window(3)])
    )
    allowed = mask.dense(positions(q), positions(k))[None]
    assert torch.equal(dense_of(mask, mask.tiles(q, k), tuple(allowed.shape)), allowed.long())


def dense_of(mask: tr.Mask, tiles: tuple, shape: tuple) -> torch.Tensor:
    """How often each (batch, query row, key row) lies in a tile; every tile is trimmed."""
    found = torch.zeros(shape, dtype=torch.int64)
    for tile in tiles:
        assert tile.trim() == tile
        rows, keys = torch.arange(tile.q_start, tile.q_stop), torch.arange(tile.k_start, tile.k_stop)
        inside = tr.Mask.band(tile.lower, tile.upper).dense(rows, keys)
        batch = slice(None) if tile.batch is None else slice(*tile.batch)
        found[batch, tile.q_start : tile.q_stop, tile.k_start : tile.k_stop] += inside
    return found


CUTS = st.lists(st.integers(0, 40), min_size=1, max_size=6).map(lambda ends: [0, *sorted(ends)])


@st.composite
def any_mask(draw: st.DrawFn) -> tr.Mask:
    """Any kind, or the intersection of two; batch 3 where there are lengths."""
    ends = sorted(draw(st.lists(st.integers(0, 40), min_size=2, max_size=8)))
    kinds = st.one_of(
        st.builds(tr.Mask.band, BOUND, BOUND),
        st.builds(tr.Mask.documents, st.just(draw(CUTS)), st.none(), st.booleans()),
        st.just(tr.Mask.spans(list(zip(ends[::2], ends[1::2])))),
        st.builds(tr.Mask.lengths, st.lists(st.integers(0, 40), min_size=3, max_size=3)),
    )
    mask = draw(kinds)
    return mask & draw(kinds) if draw(st.booleans()) else mask


@given(RUNS, RUNS, any_mask())
@with_settings(max_examples=400)
def test_tiles_of_every_kind_of_mask_hold_every_allowed_pair_once(q: list, k: list, mask: tr.Mask) -> None:
    allowed = mask.dense(positions(q), positions(k)).expand(3, -1, -1)
    assert torch.equal(dense_of(mask, mask.tiles(q, k), tuple(allowed.shape)), allowed.long())


@given(any_mask(), any_mask())
def test_an_intersection_allows_what_both_allow(one: tr.Mask, other: tr.Mask) -> None:
    here = torch.arange(42)
    try:
        both = one & other
    except ValueError as error:
        assert "cannot be joined" in str(error)
        return
    a, b = (mask.dense(here, here).expand(3, -1, -1) for mask in (one, other))
    assert torch.equal(both.dense(here, here).expand(3, -1, -1), a & b)
    assert both.dense(here, here).equal((other & one).dense(here, here))


def test_spans_see_both_ways_inside_and_causally_outside() -> None:
    dense = tr.Mask.spans(torch.tensor([[1, 3], [4, 6]])).dense(torch.arange(6), torch.arange(6))
    rows = ["100000", "111000", "111000", "111100", "111111", "111111"]
    assert ["".join(str(int(x)) for x in row) for row in dense] == rows


def test_a_thousand_documents_cost_tiles_in_proportion() -> None:
    cu = list(range(0, 64 * 1001, 64))
    mask, layout = tr.Mask.documents(cu), tr.Layout.zigzag(64_000, 4)
    own = mask.tiles(layout.segments(1), layout.segments(1))
    assert len(own) == 250 and sum(t.pairs() for t in own) == 250 * 64 * 65 // 2
    assert mask.tiles(layout.segments(1), layout.segments(2)) == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tr.Mask.documents([1, 4]), "give 0, the end of each document"),
        (lambda: tr.Mask.documents([0, 4, 3]), "not descending"),
        (lambda: tr.Mask.documents([0, 2.5]), "give integers"),
        (lambda: tr.Mask.documents(torch.tensor([[0, 2]])), "integers in one dim"),
        (lambda: tr.Mask.documents([0, 4], [0, 2, 4]), "1 documents of queries and 2 of keys"),
        (lambda: tr.Mask.spans([(0, 4), (3, 6)]), r"\(0, 4\) before a span that starts at 3"),
        (lambda: tr.Mask.spans([(4, 2)]), "0 <= start <= end"),
        (lambda: tr.Mask.lengths([]), "one length of 0 or more for each batch entry"),
        (lambda: tr.Mask.lengths([3, -1]), "one length of 0 or more"),
        (lambda: tr.Mask.documents([0, 4]) & tr.Mask.documents([0, 5]), "one says q_stop is 4, the other 5"),
        (lambda: tr.Mask.documents([0, 4], [0, 6]) & tr.Mask.window(2), "packed on axes of their own"),
        (lambda: tr.Mask.window(2.5), "left=2.5.* integers of 0 or more"),
        (lambda: tr.Mask.spans([(0.5, 5.7)]), "give integers"),
        (lambda: tr.Mask.spans([(0, 5, 7)]), r"give \(start, end\) pairs of integers"),
        (lambda: tr.Mask.documents([0, float("nan")]), "give integers"),
        (lambda: tr.Mask.of(torch.ones(3, 3)), "a tensor of shape .*mask tensors are never accepted"),
    ],
)
def test_what_a_mask_cannot_be_is_refused(make: Callable[[], tr.Mask], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (tr.Mask.documents([0, 4, 7]), "the mask's documents end at query 7 and key 7; .* keys at 8"),
        (tr.Mask.documents([0, 4, 9]), "must be the length of the sequence"),
        (tr.Mask.documents([0, 9], [0, 8]), "documents end at query 9"),
        (tr.Mask.spans([(2, 9)]), "reach to position 9; the keys end at 8"),
        (tr.Mask.lengths([8, 9]), "reach to position 9"),
        (tr.Mask.lengths([8, 8, 8]), "lengths for 3 batch entries; the tensors have 2"),
    ],
)
def test_a_mask_that_is_not_true_of_the_sequence_is_refused(mask: tr.Mask, message: str) -> None:
    shape = tr.AttentionShape(2, 8, 8, 2, 2, 4)
    with pytest.raises(ValueError, match=message):
        tr.plan("ring", world=2, shape=shape, layout="zigzag", mask=mask)
    q = torch.randn(2, 8, 2, 4)
    with pytest.raises(ValueError, match=message):
        tr.attention(q, q, q, mask=mask)


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

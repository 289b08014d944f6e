"""Dealing new tokens: what every rank works out alone is balanced, complete, and stays short."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenring.caching.dealing import between, compacted, deal, joined
from tokenring.layout import Layout
from tokenring.segments import Segment

HELD = st.lists(st.integers(0, 12), min_size=1, max_size=8)


def positions(layout: Layout) -> list[list[int]]:
    return [layout.positions(rank).tolist() for rank in range(layout.world)]


def grown(world: int, counts: list[int]) -> Layout:
    whole = Layout.contiguous(0, world)
    for count in counts:
        whole = joined(whole, deal([whole.length(r) for r in range(world)], count, offset=whole.total))
    return whole


@given(HELD, st.integers(0, 40), st.integers(0, 30))
def test_a_chunk_is_cut_as_tokens_one_by_one_would_fill_the_ranks(held: list[int], count: int, offset: int) -> None:
    chunk = deal(held, count, offset=offset)
    one_by_one = list(held)
    for _ in range(count):
        one_by_one[one_by_one.index(min(one_by_one))] += 1
    assert [h + chunk.length(r) for r, h in enumerate(held)] == one_by_one
    assert sorted(p for rank in positions(chunk) for p in rank) == list(range(offset, offset + count))
    assert all(len(chunk.segments(r)) <= 2 for r in range(len(held)))


@given(st.integers(1, 8), st.lists(st.integers(0, 23), min_size=1, max_size=12))
def test_ranks_hold_equally_many_rows_after_any_chunks(world: int, counts: list[int]) -> None:
    whole = Layout.contiguous(0, world)
    for count in counts:
        before = positions(whole)
        whole = joined(whole, deal([whole.length(r) for r in range(world)], count, offset=whole.total))
        lengths = [whole.length(r) for r in range(world)]
        assert max(lengths) - min(lengths) <= 1
        assert [after[: len(b)] for b, after in zip(before, positions(whole))] == before  # nothing held moves
    assert sorted(p for rank in positions(whole) for p in rank) == list(range(sum(counts)))


def test_a_first_chunk_is_a_zigzag() -> None:
    for world, length in ((1, 5), (2, 16), (3, 12), (4, 40)):
        assert positions(deal([0] * world, length)) == positions(Layout.zigzag(length, world))


def test_a_rank_that_holds_much_still_takes_what_it_must() -> None:
    assert [deal([90, 0, 3], 8).length(r) for r in range(3)] == [0, 6, 2]
    assert [deal([90, 0, 3], 8, at_least=1).length(r) for r in range(3)] == [1, 5, 2]
    with pytest.raises(ValueError, match="give 9 tokens or more, or a smaller at_least"):
        deal([90, 0, 3], 8, at_least=3)


def test_layouts_stay_short_however_long_decoding_goes_on() -> None:
    whole = grown(4, [64] + [1] * 1000)
    assert max(len(whole.segments(r)) for r in range(4)) <= 4
    assert [whole.length(r) for r in range(4)] == [266] * 4
    # A prompt of an odd length first: who holds less takes the first tokens, and the turns go on from there.
    uneven = grown(4, [61] + [1] * 403)
    assert max(len(uneven.segments(r)) for r in range(4)) <= 5
    assert sorted(p for rank in positions(uneven) for p in rank) == list(range(464))


@given(st.integers(1, 5), st.lists(st.integers(0, 11), min_size=1, max_size=5), st.integers(0, 40), st.integers(0, 40))
def test_a_range_of_positions_keeps_its_rows_in_order(world: int, counts: list[int], start: int, length: int) -> None:
    whole = grown(world, counts)
    part = between(whole, start, start + length)
    assert positions(part) == [[p for p in rank if start <= p < start + length] for rank in positions(whole)]
    assert part.offset == start or part.total == 0


@given(st.integers(1, 5), st.lists(st.integers(0, 11), min_size=2, max_size=5))
def test_a_compacted_layout_differs_only_in_who_holds_which_old_position(world: int, counts: list[int]) -> None:
    whole = grown(world, counts)
    since = sum(counts[:-1])
    short = compacted(whole, since)
    for old, new in zip(positions(whole), positions(short)):
        assert [p >= since for p in old] == [p >= since for p in new]
        assert [p for p in old if p >= since] == [p for p in new if p >= since]
    assert sorted(p for rank in positions(short) for p in rank) == list(range(sum(counts)))
    assert all(len(short.segments(r)) <= 3 for r in range(world))


def test_a_layout_with_old_rows_behind_new_ones_is_left_as_it_is() -> None:
    mixed = Layout.from_runs([[Segment(4, 2), Segment(0, 2)], [Segment(2, 2)]])
    assert compacted(mixed, 3) is mixed


def test_offsets_other_than_zero() -> None:
    first = Layout.zigzag(6, 2, offset=10)
    whole = joined(first, deal([3, 3], 3, offset=16))
    assert whole.offset == 10
    assert positions(whole) == [[10, 11, 15, 16, 18], [12, 13, 14, 17]]
    assert torch.equal(torch.cat([compacted(whole, 16).positions(r)[3:] for r in range(2)]), torch.tensor([16, 18, 17]))


def test_what_does_not_follow_is_refused() -> None:
    whole = Layout.zigzag(6, 2)
    with pytest.raises(ValueError, match="the next position is 6"):
        joined(whole, deal([3, 3], 2, offset=7))
    with pytest.raises(ValueError, match="over 3 ranks cannot follow"):
        joined(whole, deal([3, 3, 0], 2, offset=6))
    for wrong in ({"count": -1}, {"offset": -1}, {"held": []}, {"held": [-1, 0]}):
        arguments = {"held": [0, 0], "count": 1, **wrong}
        with pytest.raises(ValueError, match="give 0 or more of each"):
            deal(arguments["held"], arguments["count"], offset=arguments.get("offset", 0))

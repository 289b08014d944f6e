"""Layouts: every position held once, put together again, labelled without loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenring as tr
from tests.pool import Pool
from tokenring.segments import Segment

MAKERS = {
    "contiguous": tr.Layout.contiguous,
    "zigzag": tr.Layout.zigzag,
    "striped": tr.Layout.striped,
    "striped in threes": lambda length, world, offset=0: tr.Layout.striped(length, world, offset, block=3),
}


@given(st.sampled_from(sorted(MAKERS)), st.integers(0, 50), st.integers(1, 9), st.integers(0, 5))
def test_every_position_is_held_exactly_once(name: str, length: int, world: int, offset: int) -> None:
    layout = MAKERS[name](length, world, offset)
    held = torch.cat([layout.positions(r) for r in range(world)])
    assert sorted(held.tolist()) == list(range(offset, offset + length))
    assert [layout.length(r) for r in range(world)] == [len(layout.positions(r)) for r in range(world)]


@given(st.integers(0, 60), st.integers(1, 9))
def test_shards_differ_by_at_most_two_rows(length: int, world: int) -> None:
    for name in ("contiguous", "zigzag", "striped"):
        lengths = [MAKERS[name](length, world).length(r) for r in range(world)]
        assert max(lengths) - min(lengths) <= (2 if name == "zigzag" else 1)


def test_the_documented_cuts() -> None:
    assert tr.Layout.contiguous(6, 2).positions(1).tolist() == [3, 4, 5]
    assert tr.Layout.zigzag(6, 2).positions(1).tolist() == [2, 3, 4]
    assert tr.Layout.zigzag(8, 2).positions(0).tolist() == [0, 1, 6, 7]
    assert tr.Layout.striped(6, 2).positions(0).tolist() == [0, 2, 4]
    assert tr.Layout.striped(8, 2, block=2).positions(1).tolist() == [2, 3, 6, 7]


def gather_and_differentiate(group: Any, layout: tr.Layout, whole: torch.Tensor, dim: int) -> tuple:
    local = layout.shard(whole, group.rank(), dim).requires_grad_()
    together = layout.gather(local, group, dim)
    weight = torch.arange(together.numel(), dtype=together.dtype).view_as(together) * (group.rank() + 1)
    (together * weight).sum().backward()
    return together.detach(), local.grad


@pytest.mark.parametrize("world", [1, 3, 4])
def test_gather_undoes_shard_and_sums_gradients_over_ranks(pool: Pool, world: int) -> None:
    for name in MAKERS:
        for length, dim in ((11, 1), (2, 0)):
            layout = MAKERS[name](length, world)
            shape = (2, length, 3) if dim == 1 else (length, 3)
            whole = torch.randn(shape, dtype=torch.float64)
            weight = torch.arange(whole.numel(), dtype=whole.dtype).view_as(whole) * sum(range(1, world + 1))
            for rank, (together, grad) in enumerate(pool.run(world, gather_and_differentiate, layout, whole, dim)):
                assert torch.equal(together, whole)
                torch.testing.assert_close(grad, layout.shard(weight, rank, dim))


def test_labels_are_shifted_over_the_whole_sequence_before_they_are_cut() -> None:
    labels = torch.arange(100, 111)[None]
    for name in MAKERS:
        layout = MAKERS[name](11, 3)
        for rank in range(3):
            expected = [101 + p if p < 10 else -100 for p in layout.positions(rank).tolist()]
            assert layout.shard_labels(labels, rank)[0].tolist() == expected


def test_moving_a_layout_moves_positions_only() -> None:
    layout = tr.Layout.zigzag(9, 2)
    moved = layout.at(5)
    assert moved.offset == 5 and torch.equal(moved.positions(1), layout.positions(1) + 5)
    x = torch.arange(9)[None]
    assert torch.equal(moved.shard(x, 1), layout.shard(x, 1))


def test_wrong_sizes_are_refused() -> None:
    layout = tr.Layout.zigzag(8, 2)
    with pytest.raises(ValueError, match=r"shard got 7 rows .* cuts 8"):
        layout.shard(torch.zeros(1, 7), 0)
    with pytest.raises(ValueError, match="group of 1 ranks; this layout has 2"):
        layout.gather(torch.zeros(1, 4), None)
    with pytest.raises(ValueError, match="rank is 2; this layout has ranks 0 to 1"):
        layout.positions(2)
    with pytest.raises(ValueError, match="length=-1"):
        tr.Layout.contiguous(-1, 2)
    with pytest.raises(ValueError, match="block=0"):
        tr.Layout.striped(4, 2, block=0)
    with pytest.raises(ValueError, match="gives that rank 4"):
        tr.run_local(2, lambda group: layout.gather(torch.zeros(1, 3), group))


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_balanced_gives_every_rank_equal_work_and_rows_for_any_mask(world: int) -> None:
    """Documents of very unlike lengths, one of them most of the sequence; work counted pair by pair."""
    length, block = 3001, 16
    cu = [0, 5, 700, 701, 701, 1100, 2900, length]
    for mask in (
        tr.Mask.documents(cu),
        tr.Mask.causal(),
        tr.Mask.full(),
        tr.Mask.window(50),
        tr.Mask.spans([(9, 900)]),
    ):
        layout = tr.Layout.balanced(mask, length, world, block)
        positions = torch.arange(length)
        allowed = mask.dense(positions, positions).sum(dim=1)
        work = [int(allowed[layout.positions(r)].sum()) for r in range(world)]
        assert max(work) <= 1.02 * sum(work) / world + block * int(allowed.max()), work
        assert max(work) <= 1.04 * sum(work) / world, work
        rows = [layout.length(r) for r in range(world)]
        assert sum(rows) == length and max(rows) - min(rows) < 2 * block
        assert torch.cat([layout.positions(r) for r in range(world)]).sort().values.equal(positions)


def test_balanced_takes_any_length_and_says_what_it_cannot() -> None:
    assert [tr.Layout.balanced("causal", 3, 5, block=2).length(r) for r in range(5)].count(0) == 3
    assert tr.Layout.balanced("causal", 0, 2).length(1) == 0
    assert tr.Layout.balanced("causal", 8, 2, block=1, offset=4).positions(0).tolist() == [4, 7, 8, 11]
    with pytest.raises(ValueError, match="block=0; block and world must be 1 or more"):
        tr.Layout.balanced("causal", 8, 2, block=0)


def test_runs_must_hold_every_position_once() -> None:
    strided = tr.Layout.from_runs([[Segment(0, 3, 2)], [Segment(1, 3, 2)]])
    assert strided.positions(1).tolist() == [1, 3, 5]
    for runs in (
        [[Segment(0, 2)], [Segment(1, 2)]],
        [[Segment(0, 2)], [Segment(3, 1)]],
        [[Segment(0, 2, 2)], [Segment(2, 1)]],
    ):
        with pytest.raises(ValueError, match="together they must hold 0 to the last position, each once"):
            tr.Layout.from_runs(runs)

"""The spread cache: rows where its layout says, room that grows by shares, windows, batches of unlike lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenring as tr
from tests.oracle import dense_attention, random_qkv
from tokenring.caching.cache import KVCache


def told(positions: list[int], batch: int = 1) -> torch.Tensor:
    """(B, rows, 1, 2) rows that tell their batch entry and position."""
    rows = torch.tensor(positions, dtype=torch.float32)
    return torch.stack([torch.stack([rows * 0 + b, rows], dim=-1) for b in range(batch)])[:, :, None]


def test_every_row_lies_where_the_layout_says() -> None:
    def work(group: Any) -> None:
        cache = KVCache(group, block=1)
        for count in (9, 1, 4, 1, 1, 12):
            chunk, start = cache.deal(count), cache.layout.total
            if count == 1:
                whole = told([start], batch=2)
                cache.extend(whole, -whole)
            else:
                mine = told(chunk.positions(cache.rank).tolist(), batch=2)
                cache.append(mine, -mine, chunk)
        assert torch.equal(cache.k, told(cache.layout.positions(cache.rank).tolist(), batch=2))
        assert torch.equal(cache.v, -cache.k)
        assert torch.equal(cache.k[:, :, 0, 1].long(), cache.positions)
        assert cache.lengths.tolist() == [cache.k.shape[1]] * 2
        assert cache.next_positions == [28, 28]
        assert [cache.layout.length(r) for r in range(3)] in ([10, 9, 9], [9, 10, 9], [9, 9, 10])

    tr.run_local(3, work)


def test_growing_copies_each_row_a_bounded_number_of_times() -> None:
    cache, copied, sizes = KVCache(), 0, []
    cache.append(told(list(range(300))), told(list(range(300))), cache.deal(300))
    assert cache.slack_nbytes() == 0
    for position in range(300, 3000):
        before = cache.nbytes()
        cache.extend(told([position]), told([position]))
        if cache.nbytes() != before:
            copied += position
            sizes.append(cache.slack_nbytes() / cache.nbytes())
    assert copied <= 34 * 3000
    assert max(sizes) <= 0.04
    assert torch.equal(cache.k, told(list(range(3000))))


def test_rows_that_are_reserved_are_not_copied() -> None:
    cache = KVCache(reserve=40)
    cache.append(told([0, 1]), told([0, 1]), cache.deal(2))
    where = cache.k.data_ptr()
    for position in range(2, 40):
        cache.extend(told([position]), told([position]))
    assert cache.k.data_ptr() == where
    assert cache.nbytes() == 40 * 2 * 2 * 4


def test_what_a_window_has_passed_is_dropped_on_all_ranks_alike() -> None:
    def work(group: Any) -> list[int]:
        cache, window, most = KVCache(group, window=16), 16, []
        chunk = cache.deal(50)
        mine = told(chunk.positions(cache.rank).tolist())
        cache.append(mine, mine, chunk)
        cache.trim()
        assert cache.layout.total == window - 1
        for position in range(50, 120):
            cache.extend(told([position]), told([position]))
            assert torch.equal(cache.k, told(cache.layout.positions(cache.rank).tolist()))
            assert cache.layout.offset <= position + 1 - window + 1
            most.append(cache.layout.total)
        return [cache.layout.offset, max(most)]

    results = tr.run_local(3, work)
    assert all(result == results[0] for result in results)
    assert results[0][1] <= 16 + 4  # the window and a quarter


def ragged(group: Any, qkv: tuple, lengths: list[int], steps: int) -> tuple:
    """Prompts of unlike lengths, padded to the longest, then tokens one by one."""
    q, k, v = qkv
    cache, longest = KVCache(group), max(lengths)
    chunk = cache.deal(longest)
    shards = [chunk.shard(x[:, :longest], cache.rank) for x in (q, k, v)]
    mask = tr.Mask.causal() & tr.Mask.lengths(lengths)
    prompt = chunk.gather(tr.attention(*shards, group=group, layout=chunk, mask=mask), group)
    cache.append(*shards[1:], chunk, lengths=lengths)
    outs = []
    for step in range(steps):
        rows = [torch.stack([x[b, n + step] for b, n in enumerate(lengths)])[:, None] for x in (q, k, v)]
        cache.extend(*rows[1:])
        outs.append(cache.decode(rows[0]))
    with pytest.raises(ValueError, match="unlike lengths"):
        cache.deal(4)
    held = [[one.length(r) for r in range(cache.world)] for one in cache.layouts]
    return prompt, torch.cat(outs, dim=1), held, cache.next_positions, int(cache.lengths.max()) - cache.k.shape[1]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_batch_of_unlike_lengths_equals_each_alone(world: int) -> None:
    lengths, steps = [9, 4, 14], 7
    qkv = random_qkv(3, max(lengths) + steps, 4, 2, 8, torch.float64)
    for prompt, out, held, stops, spare in tr.run_local(world, ragged, qkv, lengths, steps):
        assert stops == [n + steps for n in lengths]
        assert spare == 0
        for entry, length in enumerate(lengths):
            q, k, v = (x[entry : entry + 1, : length + steps] for x in qkv)
            places = torch.arange(length + steps)
            want, _ = dense_attention(q, k, v, tr.Mask.causal().dense(places, places))
            torch.testing.assert_close(prompt[entry : entry + 1, :length], want[:, :length], rtol=0, atol=1e-12)
            torch.testing.assert_close(out[entry : entry + 1], want[:, length:], rtol=0, atol=1e-12)
        # The prompt's cut decides how its valid rows lie; tokens then fill up who holds the fewest.
        assert all(sum(each) == n + steps for each, n in zip(held, lengths))
        assert max(max(each) - min(each) for each in held) <= max(1, max(lengths) // world)


def test_entries_can_be_selected_and_repeated() -> None:
    cache = KVCache()
    cache.append(told([0, 1, 2], batch=2), told([0, 1, 2], batch=2), cache.deal(3), lengths=[3, 1])
    cache.select([1, 0, 1])
    assert cache.next_positions == [1, 3, 1]
    assert cache.k[:, 0, 0, 0].tolist() == [1.0, 0.0, 1.0]
    cache.select(torch.tensor([1]))
    assert torch.equal(cache.k, told([0, 1, 2]))
    assert cache.deal(2).positions(0).tolist() == [3, 4]  # of like lengths again


def test_no_gradient_and_no_view_is_kept() -> None:
    rows = torch.randn(1, 4, 2, 8, requires_grad=True)
    cache = KVCache()
    cache.append(rows, rows, cache.deal(4))
    assert not cache.k.requires_grad
    rows.data.zero_()
    assert cache.k.abs().sum() > 0


def test_a_cache_can_start_at_any_position_and_start_again() -> None:
    cache = KVCache()
    cache.append(told([7, 8]), told([7, 8]), tr.Layout.contiguous(2, 1, offset=7))
    cache.extend(told([9]), told([9]))
    assert cache.positions.tolist() == [[7, 8, 9]]
    cache.reset()
    assert cache.nbytes() == cache.slack_nbytes() == 0
    with pytest.raises(ValueError, match="the cache is empty"):
        _ = cache.k
    cache.extend(told([0, 1]), told([0, 1]))
    assert cache.positions.tolist() == [[0, 1]]


def test_what_does_not_fit_is_refused_and_nothing_is_kept() -> None:
    cache = KVCache()
    rows = told([0, 1, 2])
    with pytest.raises(ValueError, match="layout is for 2 ranks and the group has 1"):
        cache.append(rows, rows, tr.Layout.contiguous(6, 2))
    with pytest.raises(ValueError, match="gives this rank 4 rows"):
        cache.append(rows, rows, cache.deal(4))
    with pytest.raises(ValueError, match=r"must be \(batch, rows, heads, head dim\)"):
        cache.append(rows, rows[:, :2], cache.deal(3))
    assert cache.layouts == ()
    cache.append(rows, rows, cache.deal(3))
    with pytest.raises(ValueError, match="the next position is 3"):
        cache.append(rows, rows, tr.Layout.contiguous(3, 1, offset=4))
    with pytest.raises(ValueError, match="batch, heads, head dim and dtype must be the same"):
        cache.extend(rows.double(), rows.double())
    with pytest.raises(ValueError, match="batch, heads, head dim and dtype must be the same"):
        cache.extend(told([3], batch=2), told([3], batch=2))
    with pytest.raises(ValueError, match=r"lengths are \[5\] for 1 entries of a chunk of 3 tokens"):
        cache.append(rows, rows, cache.deal(3), lengths=[5])
    assert cache.positions.tolist() == [[0, 1, 2]]
    for options in ({"window": 0}, {"reserve": -1}, {"block": 0}):
        with pytest.raises(ValueError, match="window and block are 1 or more rows"):
            KVCache(**options)

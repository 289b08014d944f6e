"""What travels: queries or keys of a chunk, partials in one round or two. The bytes say, and so does the reference's rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenring as tr
from tests.oracle import dense_attention, random_qkv
from tests.pool import Pool
from tokenring.caching import combine
from tokenring.caching.dealing import compacted, deal, joined
from tokenring.topology import Topology

WORLD, TOTAL, HEADS, DIM = 4, 8192, 32, 128


def chunk_plan(schedule: str, new: int, group_size: int, mask: Any, dtype: torch.dtype = torch.bfloat16) -> tr.Plan:
    """`new` tokens on top of a cache, TOTAL in all, dealt over the ranks."""
    held = deal([0] * WORLD, TOTAL - new)
    chunk = deal([held.length(r) for r in range(WORLD)], new, offset=TOTAL - new)
    keys = joined(held, chunk)
    shape = tr.AttentionShape(1, new, TOTAL, HEADS, HEADS // group_size, DIM, dtype=dtype)
    return tr.plan(schedule, world=WORLD, shape=shape, layout=chunk, kv_layout=keys, mask=mask)


def sent(plan: tr.Plan) -> int:
    return sum(plan.bytes_sent(rank) for rank in range(WORLD))


@pytest.mark.parametrize("group_size", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_queries_weigh_less_than_keys_below_the_fraction_of_the_reference(group_size: int, dtype: torch.dtype) -> None:
    """T / (T + P) < 1 / g in bytes, save for the lse that goes back with the output."""
    size = dtype.itemsize
    threshold = (2 * DIM * size) / (2 * DIM * size + 4) / group_size
    for share in (0.1, 0.5, 0.97, 1.03, 2.0):
        new = round(TOTAL * share / group_size / 8) * 8
        if not 8 <= new < TOTAL:
            continue
        queries = sent(chunk_plan("tokenring", new, group_size, "full", dtype))
        keys = sent(chunk_plan("ring", new, group_size, "full", dtype))
        assert queries == (WORLD - 1) * new * HEADS * (2 * DIM * size + 4)
        assert keys == (WORLD - 1) * TOTAL * HEADS // group_size * 2 * DIM * size
        assert (queries < keys) == (new / TOTAL < threshold)


@pytest.mark.parametrize("group_size", [1, 2, 4, 8])
def test_auto_moves_queries_far_below_the_fraction_and_keys_far_above(group_size: int) -> None:
    for share, moves_queries in ((0.02, True), (0.25, True), (0.5, True), (2.0, False), (4.0, False)):
        new = round(TOTAL * share / group_size)
        if new < TOTAL:
            assert (chunk_plan("auto", new, group_size, "causal").schedule == "tokenring") == moves_queries


def test_a_compacted_cache_layout_gives_the_same_bytes_and_far_fewer_runs() -> None:
    whole = tr.Layout.contiguous(0, WORLD)
    for _ in range(12):
        whole = joined(whole, deal([whole.length(r) for r in range(WORLD)], 50, offset=whole.total))
    chunk = deal([whole.length(r) for r in range(WORLD)], 40, offset=whole.total)
    whole = joined(whole, chunk)
    shape = tr.AttentionShape(1, 40, whole.total, 8, 2, 16)
    for schedule in ("tokenring", "ring", "gather"):
        long, short = (
            tr.plan(schedule, world=WORLD, shape=shape, layout=chunk, kv_layout=keys, mask="causal")
            for keys in (whole, compacted(whole, chunk.offset))
        )
        assert [long.bytes_sent(r) for r in range(WORLD)] == [short.bytes_sent(r) for r in range(WORLD)]
        short.check()
    assert len(whole.segments(0)) > 10
    assert len(compacted(whole, chunk.offset).segments(0)) <= 3


def partials(world: int, batch: int, rows: int, heads: int, dim: int, dtype: torch.dtype) -> list[tuple]:
    """Attention of the same queries over each rank's keys, and over all keys."""
    q, k, v = random_qkv(batch, rows, heads, heads, dim, torch.float64, kv_length=5 * world)
    parts = []
    for rank in range(world):
        mine = slice(5 * rank, 5 * rank + (5 if rank != 1 else 0))  # rank 1 has none
        out, lse = dense_attention(
            q, k[:, mine], v[:, mine], torch.ones(rows, mine.stop - mine.start, dtype=torch.bool)
        )
        parts.append((out.to(dtype), lse.to(dtype)))
    return parts


def combined(group: Any, parts: list[tuple], way: str, sinks: Any, return_lse: bool, dtype: torch.dtype) -> tuple:
    runtime = tr.connect(group)
    with tr.count_traffic(group) as traffic:
        out, lse = combine.combine(
            *parts[runtime.rank], runtime, dtype=dtype, sinks=sinks, return_lse=return_lse, way=way
        )
    return out, lse, traffic.sent


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("way", combine.WAYS)
def test_both_ways_merge_alike_and_send_what_they_say(world: int, way: str) -> None:
    sinks = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64)
    for batch, rows in ((1, 1), (2, 4)):
        parts = partials(world, batch, rows, 3, 8, torch.float64)
        want = tr.run_local(1, combined, [_by_hand(parts)], "gather", sinks, True, torch.float64)[0]
        for return_lse in (False, True):
            results = tr.run_local(world, combined, parts, way, sinks, return_lse, torch.float64)
            expected = combine.bytes_sent(way, world, batch * rows * 3, 8, 8, 8, return_lse)
            for rank, (out, lse, traffic) in enumerate(results):
                torch.testing.assert_close(out, want[0], rtol=0, atol=1e-14)
                assert torch.equal(out, results[0][0])
                assert (lse is None) != return_lse
                if return_lse:
                    torch.testing.assert_close(lse, want[1], rtol=0, atol=1e-14)
                    assert torch.equal(lse, results[0][1])
                assert traffic == {pair: n for pair, n in expected.items() if pair[0] == rank and n}


def _by_hand(parts: list[tuple]) -> tuple:
    lse = torch.logsumexp(torch.stack([lse for _, lse in parts]), dim=0)
    weights = [torch.exp(part - lse).transpose(1, 2).unsqueeze(-1) for _, part in parts]
    return sum(weight * out for weight, (out, _) in zip(weights, parts)), lse


def test_the_result_travels_in_its_own_dtype(pool: Pool) -> None:
    parts = partials(4, 1, 6, 3, 8, torch.float32)
    results = pool.run(4, combined, parts, "scatter", None, False, torch.bfloat16)
    want, _ = _by_hand(parts)
    for rank, (out, _, traffic) in enumerate(results):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, want.bfloat16(), rtol=0, atol=2e-2)
        assert torch.equal(out, results[0][0])
        expected = combine.bytes_sent("scatter", 4, 18, 8, 4, 2)
        assert traffic == {pair: n for pair, n in expected.items() if pair[0] == rank}


def test_the_way_follows_the_links() -> None:
    many, one = (4, 4096, 128, 4, 2, False), (4, 32, 128, 4, 2, False)
    assert [combine.choose_way(*one), combine.choose_way(*many)] == ["gather", "scatter"]
    slow_start, thin = Topology.switch(4, 100.0, latency_us=1e4), Topology.switch(4, 0.001, latency_us=1)
    assert [combine.choose_way(*size, slow_start) for size in (one, many)] == ["gather", "gather"]
    assert [combine.choose_way(*size, thin) for size in (one, many)] == ["scatter", "scatter"]
    # Two ranks in float32 that want lse too: both ways send the same, and one round is less than two.
    assert combine.choose_way(2, 10**6, 128, 4, 4, True) == "gather"
    with pytest.raises(ValueError, match="give auto, gather or scatter"):
        combine.combine(*partials(1, 1, 1, 1, 4, torch.float32)[0], tr.connect(None), dtype=torch.float32, way="ring")

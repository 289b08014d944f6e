"""Prefill in chunks and decoding against a cache that is spread over ranks equal dense attention over the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenring as tr
from tests.oracle import dense_attention, random_qkv
from tests.pool import Pool
from tests.tokenring.every_schedule import schedule_names
from tokenring.caching.cache import KVCache

Chunks = list[int]


def prefill(group: Any, qkv: tuple, chunks: Chunks, masks: list, schedule: str, exact: bool = False) -> tuple:
    """Every chunk dealt, appended and attended to; the whole output, and the rows of each rank after each chunk."""
    cache, outs, rows, at = KVCache(group), [], [], 0
    for count, mask in zip(chunks, masks):
        chunk = cache.deal(count)
        q, k, v = (chunk.shard(x[:, at : at + count], cache.rank) for x in qkv)
        cache.append(k, v, chunk)
        if exact:
            options = {"layout": chunk, "kv_layout": cache.layout, "group": group}
            out = tr.attention(q, cache.k, cache.v, mask=mask, schedule=schedule, **options)
        else:
            out = cache.attention(q, chunk, mask=mask, schedule=schedule)
        outs.append(chunk.gather(out, group))
        rows.append([cache.layout.length(r) for r in range(cache.world)])
        at += count
    return torch.cat(outs, dim=1), rows


def dense(qkv: tuple, chunks: Chunks, masks: list) -> torch.Tensor:
    """The same by the book: each chunk over all keys up to its end."""
    outs, at = [], 0
    for count, mask in zip(chunks, masks):
        stop = at + count
        allowed = tr.Mask.of(mask).dense(torch.arange(at, stop), torch.arange(stop))
        allowed = allowed if allowed.dim() == 3 else allowed.expand(qkv[0].shape[0], -1, -1)
        entries = zip(*(x[:, None] for x in (qkv[0][:, at:stop], qkv[1][:, :stop], qkv[2][:, :stop])), allowed)
        outs.append(torch.cat([dense_attention(q, k, v, seen)[0] for q, k, v, seen in entries]))
        at = stop
    return torch.cat(outs, dim=1)


def check(world: int, chunks: Chunks, masks: list, schedule: str, heads: tuple = (4, 2), exact: bool = False) -> None:
    qkv = random_qkv(2, sum(chunks), *heads, 8, torch.float64, v_dim=6, seed=world)
    for out, rows in tr.run_local(world, prefill, qkv, chunks, masks, schedule, exact):
        torch.testing.assert_close(out, dense(qkv, chunks, masks), rtol=0, atol=1e-12)
        assert all(max(each) - min(each) <= 1 for each in rows)


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("schedule", ["auto", "tokenring", "ring", "gather"])
def test_uneven_chunks_in_a_row_equal_dense_attention(world: int, schedule: str) -> None:
    check(world, [13, 1, 7, 2, 17], ["causal"] * 5, schedule)


@pytest.mark.parametrize("schedule", schedule_names(4))
def test_every_schedule_takes_a_chunk_on_a_cache(schedule: str) -> None:
    check(4, [9, 6, 11], ["causal"] * 3, schedule, heads=(8, 4))


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_grouped_heads_and_the_cache_s_own_layout(heads: tuple[int, int]) -> None:
    for exact in (False, True):
        check(3, [10, 5, 8], ["causal"] * 3, "auto", heads=heads, exact=exact)


@pytest.mark.parametrize("kind", ["full", "window", "both-sided window", "documents", "spans", "lengths"])
@pytest.mark.parametrize("schedule", ["tokenring", "ring", "gather"])
def test_masks_over_chunks(kind: str, schedule: str) -> None:
    """What a mask says of the sequence ends where the chunk ends: documents and lengths grow from chunk to chunk."""
    chunks, ends = [12, 7, 9], [12, 19, 28]
    mask_at = {
        "full": lambda end: tr.Mask.full(),
        "window": lambda end: tr.Mask.window(5),
        "both-sided window": lambda end: tr.Mask.window(4, 2),
        "documents": lambda end: tr.Mask.documents([c for c in (0, 5, 14, 16) if c < end] + [end]),
        "spans": lambda end: tr.Mask.spans([s for s in [(2, 6), (13, 17)] if s[1] <= end]),
        "lengths": lambda end: tr.Mask.causal() & tr.Mask.lengths([end, end - 4]),
    }[kind]
    check(5, chunks, [mask_at(end) for end in ends], schedule)


@settings(max_examples=25)
@given(
    st.integers(1, 6),
    st.lists(st.integers(1, 14), min_size=1, max_size=5),
    st.sampled_from(["causal", "window", "full"]),
    st.sampled_from(["auto", "tokenring", "ring", "biring", "gather"]),
)
def test_any_chunks_equal_dense_attention(world: int, chunks: Chunks, kind: str, schedule: str) -> None:
    mask = tr.Mask.window(6) if kind == "window" else tr.Mask.of(kind)
    check(world, chunks, [mask] * len(chunks), schedule, exact=len(chunks) % 2 == 0)


def conversation(group: Any, qkv: tuple, turns: list[tuple[int, int]], window: int | None) -> tuple:
    """Prompt, answer, prompt, answer: chunks cut over the ranks, then tokens that are the same on every rank."""
    cache, outs, at = KVCache(group, window=window), [], 0
    mask = tr.Mask.causal() if window is None else tr.Mask.window(window - 1)
    for prompt, answer in turns:
        chunk = cache.deal(prompt)
        q, k, v = (chunk.shard(x[:, at : at + prompt], cache.rank) for x in qkv)
        cache.append(k, v, chunk)
        outs.append(chunk.gather(cache.attention(q, chunk, mask=mask), group))
        at += prompt
        for _ in range(answer):
            q, k, v = (x[:, at : at + 1] for x in qkv)
            cache.extend(k, v)
            outs.append(cache.decode(q, mask=mask))
            at += 1
    held = [cache.layout.length(r) for r in range(cache.world)]
    return torch.cat(outs, dim=1), held, cache.next_positions


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("window", [None, 7])
def test_a_conversation_equals_dense_attention(world: int, window: int | None) -> None:
    turns = [(11, 6), (5, 3), (9, 9)]
    total = sum(sum(turn) for turn in turns)
    qkv = random_qkv(2, total, 6, 2, 8, torch.float64)
    mask = tr.Mask.causal() if window is None else tr.Mask.window(window - 1)
    want, _ = dense_attention(*qkv, mask.dense(torch.arange(total), torch.arange(total)))
    for out, held, stops in tr.run_local(world, conversation, qkv, turns, window):
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        assert stops == [total, total]
        if window is None:
            assert sum(held) == total
            assert max(held) - min(held) <= 1
        else:
            assert sum(held) <= window + 4  # what the window has passed is gone


def test_processes_over_gloo_in_single_and_half_precision(pool: Pool) -> None:
    turns, total = [(20, 3), (9, 4)], 36
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        qkv = random_qkv(1, total, 8, 2, 16, dtype)
        want, _ = dense_attention(*qkv, tr.Mask.causal().dense(torch.arange(total), torch.arange(total)))
        results = pool.run(4, conversation, qkv, turns, None)
        for out, held, _ in results:
            torch.testing.assert_close(out.double(), want, rtol=0, atol=tolerance)
            assert held == [9, 9, 9, 9]
            assert torch.equal(out, results[0][0])


def test_gradients_reach_the_queries_of_a_chunk() -> None:
    q, k, v = random_qkv(1, 12, 4, 2, 8, torch.float64)

    def work(group: Any) -> torch.Tensor:
        cache = KVCache(group)
        first = cache.deal(7)
        cache.append(*(first.shard(x[:, :7], cache.rank) for x in (k, v)), first)
        second = cache.deal(5)
        cache.append(*(second.shard(x[:, 7:], cache.rank) for x in (k, v)), second)
        mine = second.shard(q[:, 7:], cache.rank).requires_grad_()
        cache.attention(mine, second).square().sum().backward()
        return second.gather(mine.grad, group)

    whole = q[:, 7:].clone().requires_grad_()
    dense_attention(whole, k, v, tr.Mask.causal().dense(torch.arange(7, 12), torch.arange(12)))[
        0
    ].square().sum().backward()
    for grad in tr.run_local(3, work):
        torch.testing.assert_close(grad, whole.grad, rtol=0, atol=1e-11)

"""Chunked prefill over ranks: queries on top of keys that are spread in another way."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenring as tr
from sparse_attn import anchor_attention
from tests.sparse_attn.ranks import assert_equals_one_device, cut_at, random, run, small
from tests.sparse_attn.test_ranks import THETAS
from tests.sparse_attn.test_ranks_backward import upstream
from tokenring.segments import Segment


def on_top(before: tr.Layout, chunk: tr.Layout) -> tr.Layout:
    """The layout of a cache whose ranks append their rows of a chunk."""
    moved = chunk.at(before.total)
    return tr.Layout.from_runs([[*before.segments(r), *moved.segments(r)] for r in range(before.world)])


@pytest.mark.parametrize("identify", THETAS)
@pytest.mark.parametrize(("world", "before", "chunk"), [(2, 96, 64), (3, 75, 61), (5, 130, 23)])
def test_rows_on_top_of_a_spread_cache_equal_one_device(identify: str, world: int, before: int, chunk: int) -> None:
    q, k, v = random(before + chunk, batch=2, dims=(16, 24), seed=before)
    inputs, layout = (q[:, before:], k, v), tr.Layout.zigzag(chunk, world, before)
    keys = on_top(tr.Layout.zigzag(before, world), tr.Layout.zigzag(chunk, world))
    options = {"config": small(identify=identify, theta=THETAS[identify]), "kv_layout": keys}
    do = upstream(inputs)
    results = run(world, layout, inputs, do, **options)
    assert results[0][3].stripe_density > 0
    assert_equals_one_device(results, layout, inputs, do, options)


@settings(max_examples=20)
@given(data=st.data(), identify=st.sampled_from(sorted(THETAS)), world=st.integers(1, 4), chunk=st.integers(1, 70))
def test_any_two_cuts_equal_one_device(data, identify: str, world: int, chunk: int) -> None:
    before = data.draw(st.integers(0, 80))

    def drawn(length: int) -> tr.Layout:
        cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
        owners = data.draw(st.lists(st.integers(0, world - 1), min_size=len(cuts) + 1, max_size=len(cuts) + 1))
        return cut_at(length, world, cuts, owners)

    q, k, v = random(before + chunk, seed=chunk)
    inputs, layout = (q[:, before:], k, v), drawn(chunk)
    config = small(theta=THETAS[identify], identify=identify, step=2)
    options = {"config": config, "kv_layout": drawn(before + chunk), "keep": data.draw(st.sampled_from([None, [0]]))}
    assert_equals_one_device(run(world, layout, inputs, **options), layout, inputs, None, options)


def test_chunks_that_end_at_groups_give_what_one_call_gives() -> None:
    (q, k, v), config = random(160), small(last=0)
    whole = anchor_attention(q, k, v, config=config)
    edges, world = [0, 64, 96, 160], 3
    held = tr.Layout.from_runs([[] for _ in range(world)])
    for start, stop in pairwise(edges):
        chunk = tr.Layout.zigzag(stop - start, world)
        held = on_top(held, chunk)
        inputs = (q[:, start:stop], k[:, :stop], v[:, :stop])
        for rank, (out, *_) in enumerate(run(world, chunk, inputs, config=config, kv_layout=held)):
            torch.testing.assert_close(out, chunk.shard(whole[:, start:stop], rank), atol=1e-12, rtol=0)


def test_documents_on_top_of_cached_documents_equal_one_device() -> None:
    q, k, v = random(150, batch=2)
    inputs = (q[:, :70], k, v)
    layout, keys = cut_at(70, 3, [20, 41], [0, 2, 0]), cut_at(150, 3, [33, 80, 121], [1, 0, 1, 2])
    for theta in (1.5, float("inf")):
        options = {
            "config": small(theta=theta),
            "kv_layout": keys,
            "cu_seqlens": [0, 30, 70],
            "kv_cu_seqlens": [0, 60, 150],
        }
        results = run(3, layout, inputs, **options)
        assert_equals_one_device(results, layout, inputs, None, options, bytes_too=theta < 2)


def test_dense_attention_on_top_of_a_spread_cache_equals_one_device() -> None:
    q, k, v = random(120)
    inputs, layout = (q[:, 80:], k, v), tr.Layout.contiguous(40, 4, 80)
    options = {
        "config": small(theta=float("inf")),
        "kv_layout": tr.Layout.from_runs([[Segment(30 * r, 30)] for r in range(4)]),
    }
    do = upstream(inputs)
    results = run(4, layout, inputs, do, **options)
    assert_equals_one_device(results, layout, inputs, do, options, bytes_too=False)

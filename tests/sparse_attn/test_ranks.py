"""AnchorAttention across ranks: the one-device result on every rank, whatever the cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenring as tr
from sparse_attn import AnchorConfig, anchor_attention, reference_attention
from tests.oracle import dense_attention
from tests.sparse_attn.ranks import assert_equals_one_device, cut_at, random, run, small
from tokenring.segments import Segment

THETAS = {"pooled": 1.5, "lse": 3.0, "rescore": 1.5, "every": 1.2}


@pytest.mark.parametrize("identify", THETAS)
@pytest.mark.parametrize("share", ["query", "key"])
@pytest.mark.parametrize(("world", "length", "name"), [(2, 205, "zigzag"), (3, 160, "contiguous"), (5, 203, "zigzag")])
def test_every_identification_equals_one_device(identify: str, share: str, world: int, length: int, name: str) -> None:
    given = random(length, batch=2, dims=(16, 24), seed=length)
    layout = getattr(tr.Layout, name)(length, world)
    options = {"config": small(theta=THETAS[identify], identify=identify, share=share)}
    results = run(world, layout, given, **options)
    assert results[0][3].stripe_density > 0
    assert_equals_one_device(results, layout, given, None, options)


@pytest.mark.parametrize("world", range(1, 9))
def test_every_world_equals_one_device(world: int) -> None:
    length = 170 + world
    given, layout = random(length, seed=world), tr.Layout.zigzag(length, world)
    for identify in ("pooled", "rescore"):
        options = {"config": small(identify=identify)}
        assert_equals_one_device(run(world, layout, given, **options), layout, given, None, options)


@settings(max_examples=25)
@given(
    data=st.data(),
    identify=st.sampled_from(sorted(THETAS)),
    world=st.integers(2, 5),
    length=st.integers(1, 150),
    share=st.sampled_from(["query", "key"]),
)
def test_any_cut_into_runs_equals_one_device(data, identify: str, world: int, length: int, share: str) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=8)))
    owners = data.draw(st.lists(st.integers(0, world - 1), min_size=len(cuts) + 1, max_size=len(cuts) + 1))
    layout = cut_at(length, world, cuts, owners)
    inputs = random(length, seed=length)
    options = {"config": small(theta=THETAS[identify], identify=identify, step=2, share=share)}
    assert_equals_one_device(run(world, layout, inputs, **options), layout, inputs, None, options)


def test_packed_documents_and_kept_rows_equal_one_device() -> None:
    inputs = random(230, batch=2)
    layout = cut_at(230, 3, [50, 97, 140, 201], [0, 1, 2, 1, 0])
    for identify in ("pooled", "rescore"):
        options = {
            "config": small(identify=identify),
            "cu_seqlens": [0, 90, 90, 230],
            "keep": [12, 13, 30, 110, 111, 150],
        }
        assert_equals_one_device(run(3, layout, inputs, **options), layout, inputs, None, options)


def test_each_rank_equals_float64_over_its_own_plans_pairs() -> None:
    q, k, v = random(200, batch=2)
    layout = tr.Layout.zigzag(200, 3)
    for rank, (out, lse, _, stats, *_) in enumerate(run(3, layout, (q, k, v), config=small(), keep=[20, 60])):
        expected, expected_lse = reference_attention(stats.plan, layout.shard(q, rank), k, v)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)


@pytest.mark.parametrize("identify", THETAS)
def test_keeping_every_column_equals_dense(identify: str) -> None:
    q, k, v = random(130)
    expected, _ = dense_attention(q, k, v, torch.ones(130, 130, dtype=torch.bool).tril())
    layout = tr.Layout.zigzag(130, 4)
    for theta, path in ((1e9, "sparse"), (float("inf"), "dense")):
        results = run(4, layout, (q, k, v), config=small(theta=theta, identify=identify))
        for rank, (out, _, _, stats, sent, _) in enumerate(results):
            torch.testing.assert_close(out, layout.shard(expected, rank), atol=1e-12, rtol=0)
            assert stats.path == path and stats.density == pytest.approx(1.0) and stats.bytes_sent == sum(sent.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("identify", ["pooled", "rescore"])
def test_narrow_dtypes_equal_one_device_to_rounding(dtype: torch.dtype, identify: str) -> None:
    inputs = [x.to(dtype) for x in random(192)]
    layout = tr.Layout.zigzag(192, 3)
    options = {"config": small(identify=identify, scores="input")}
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    results = run(3, layout, inputs, **options)
    assert results[0][0].dtype == dtype and results[0][1].dtype == torch.float32
    assert_equals_one_device(results, layout, inputs, None, options, tolerance)


def test_only_wanted_rows_travel() -> None:
    q, k, v = random(256)
    layout = tr.Layout.contiguous(256, 4)
    few, many = (run(4, layout, (q, k, v), config=small(theta=t, identify="pooled")) for t in (-float("inf"), 1e9))
    for less, more in zip(few[:3], many):  # nobody wants rows of the last rank
        assert [p.schedule for p in less[3].plans][-1] == "anchor:stripes"
        assert sum(p.bytes_sent(r) for p in less[3].plans[2:] for r in range(4)) == 0
        assert less[3].bytes_sent < more[3].bytes_sent
    assert many[0][3].wanted == pytest.approx((3 + 2 + 1) / 12, abs=0.02)


def test_one_row_that_one_group_wants_is_all_that_travels() -> None:
    q, k, v = (torch.zeros(1, 128, 2, 8, dtype=torch.float64) for _ in range(3))
    k[0, 20, 1, 0], q[0, 100, 1, 0] = 50.0, 50.0
    layout = tr.Layout.contiguous(128, 4)
    results = run(4, layout, (q, k, v), config=small(theta=-1.0, identify="every"))
    sent = next(p for p in results[0][3].plans if p.schedule == "anchor:stripes:values")
    row = 8 * 8
    assert [[sent.bytes_sent(s, d) for d in range(4)] for s in range(4)] == [[0, 0, 0, row], *[[0] * 4] * 3]
    assert results[3][3].plan.columns(0, 0, 1).tolist() == [20]


def test_default_configuration_runs_across_ranks() -> None:
    inputs = random(160)
    layout = tr.Layout.zigzag(160, 2)
    options = {"config": AnchorConfig()}
    results = run(2, layout, inputs, **options)
    assert results[0][3].path == "dense" and results[0][3].why
    assert sum(result[3].ring_bytes for result in results) == sum(x.numel() * x.element_size() for x in inputs[1:])
    assert_equals_one_device(results, layout, inputs, None, options, bytes_too=False)


@pytest.mark.parametrize(
    ("identify", "theta", "path"), [("pooled", 20.0, "dense"), ("rescore", 20.0, "dense"), ("rescore", -2.0, "sparse")]
)
def test_a_sample_decides_as_on_one_device(identify: str, theta: float, path: str) -> None:
    inputs = random(4300, dims=(64, 64), seed=4)
    layout = tr.Layout.zigzag(4300, 3)
    options = {"config": AnchorConfig(theta=theta, identify=identify, block=32, step=4)}
    results = run(3, layout, inputs, **options)
    _, whole = anchor_attention(*inputs, **options, return_stats=True)
    assert all(result[3].path == whole.path == path and result[3].why == whole.why for result in results)
    assert "sample" in whole.why and results[0][3].plans[0].schedule == "anchor:halo"
    assert_equals_one_device(results, layout, inputs, None, options, bytes_too=path == "sparse")


@pytest.mark.parametrize(
    ("identify", "dtype"), [("pooled", torch.bfloat16), ("pooled", torch.float64), ("rescore", torch.float64)], ids=str
)
def test_a_rank_may_hold_its_runs_in_any_order(identify: str, dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in random(160, batch=2)]
    mine = [Segment(140, 20), Segment(110, 14), Segment(96, 14), Segment(0, 40)]
    layout = tr.Layout.from_runs([mine, [Segment(124, 16), Segment(40, 56)]])
    options = {"config": small(identify=identify, scores="input")}
    results = run(2, layout, inputs, **options)
    assert_equals_one_device(results, layout, inputs, None, options, 1e-12 if dtype == torch.float64 else 2e-2)

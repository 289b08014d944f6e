"""Which path runs: the cost model, what it is told by a sample, and that either path is right."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_attn import AnchorConfig, anchor_attention, plan
from sparse_attn.cost import groups_for, pays, resolved, sparse_cost
from sparse_attn.geometry import Geometry
from tests.oracle import dense_attention, random_qkv


def geometry(length: int) -> Geometry:
    return Geometry.of((((0, length), (0, length)),), *groups_for(length))


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def test_short_sequences_run_densely_and_say_so() -> None:
    q, k, v = random_qkv(1, 500, 2, 1, 16, torch.float64)
    out, stats = anchor_attention(q, k, v, config=AnchorConfig(), return_stats=True)
    assert stats.path == "dense" and "modelled" in stats.why and stats.density == 1.0 and "dense" in stats.seconds
    torch.testing.assert_close(out, dense_attention(q, k, v, causal(500))[0], atol=1e-12, rtol=0)


def test_where_everything_is_kept_the_sample_says_dense_and_the_result_is_exact() -> None:
    q, k, v = random_qkv(1, 9000, 1, 1, 32, torch.float64)
    config = AnchorConfig(theta=1e9, identify="lse")
    out, lse, stats = anchor_attention(q, k, v, config=config, return_lse=True, return_stats=True)
    assert stats.path == "dense" and "sample" in stats.why and set(stats.seconds) == {"sample", "dense"}
    expected, expected_lse = anchor_attention(q, k, v, config=AnchorConfig(theta=math.inf), return_lse=True)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)


def test_long_sequences_with_few_columns_run_sparsely() -> None:
    q, k, v = random_qkv(1, 8192, 1, 1, 64, torch.float32)
    _, stats = anchor_attention(q, k, v, config=AnchorConfig(theta=-3.0, identify="lse"), return_stats=True)
    assert stats.path == "sparse" and stats.density < 0.2
    shown = repr(stats.plan)
    assert len(shown) < 250 and f"{stats.plan.indices.numel()} columns" in shown and "batch 1, 1 query heads" in shown


def test_never_dense_is_honoured_at_any_length() -> None:
    q, k, v = random_qkv(1, 300, 1, 1, 8, torch.float32)
    _, stats = anchor_attention(q, k, v, config=AnchorConfig(dense="never", block=16, step=2), return_stats=True)
    assert stats.path == "sparse"


@pytest.mark.parametrize("method", ["pooled", "lse", "rescore", "every"])
def test_the_cost_rises_with_what_is_kept_and_passed(method: str) -> None:
    g, config = geometry(16384), AnchorConfig(identify=method)
    costs = [sparse_cost(g, config, 2, 64, kept, 0.3) for kept in (0.0, 0.1, 0.5, 1.0)]
    assert costs == sorted(costs) and costs[-1] > g.causal_pairs
    assert sparse_cost(g, config, 2, 64, 0.1, 0.9) >= sparse_cost(g, config, 2, 64, 0.1, 0.1)


def test_stripes_pay_from_some_length_on() -> None:
    lengths = [256, 1024, 4096, 16384, 65536]
    worth = [pays(geometry(n), AnchorConfig(identify="pooled"), 1, 64)[0] for n in lengths]
    assert worth == sorted(worth) and not worth[0] and worth[-1]


def test_groups_follow_the_length_and_what_is_given_wins() -> None:
    rows = [block * step for block, step in map(groups_for, (100, 2000, 8192, 32768, 1 << 20))]
    assert rows == sorted(rows) and rows[0] == 128 and rows[-1] == 1024
    assert resolved(AnchorConfig(), 16384) == groups_for(16384)
    assert resolved(AnchorConfig(block=100, step=3), 16384) == (100, 3)
    assert resolved(AnchorConfig(block=128), 16384) == (128, 4)


def test_the_three_phases_are_timed() -> None:
    q, k, v = random_qkv(1, 700, 1, 1, 8, torch.float32)
    _, stats = anchor_attention(q, k, v, config=AnchorConfig(dense="never"), return_stats=True)
    assert set(stats.seconds) == {"anchor", "identify", "stripes"} and all(s >= 0 for s in stats.seconds.values())


def test_a_plan_serves_again_without_being_found_again() -> None:
    q, k, v = random_qkv(1, 400, 2, 1, 16, torch.float32)
    found = plan(q, k, config=AnchorConfig(theta=1.0, block=16, step=2, dense="never"))
    _, stats = anchor_attention(q, k, v, plan=found, return_stats=True)
    assert stats.plan is found and "identify" not in stats.seconds

"""Where AnchorAttention says it is exact: theta = infinity, and any plan against float64 over the plan's own pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenring as tr
from sparse_attn import AnchorConfig, anchor_attention, execute, plan, reference_attention
from tests.oracle import dense_attention, random_qkv

ALL = math.inf
LENGTHS = (1, 5, 7, 8, 9, 16, 31, 32, 33, 47, 64, 65, 97, 129)
METHODS = ("pooled", "lse", "rescore", "every")


def small(theta: float = ALL, **options) -> AnchorConfig:
    return AnchorConfig(**{"theta": theta, "block": 8, "step": 4, "dense": "never", **options})


def causal(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def through_stripes(q, k, v, config, **options):
    """Keep everything, but by way of stripes: one head of three drops nothing that any finite test would keep."""
    huge = AnchorConfig(**{**vars(config), "theta": 1e9})
    return anchor_attention(q, k, v, config=huge, return_lse=True, return_stats=True, **options)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("method", METHODS)
def test_keeping_every_column_equals_dense_for_every_length(length: int, method: str) -> None:
    q, k, v = random_qkv(2, length, 4, 2, 16, torch.float64, seed=length)
    expected, expected_lse = dense_attention(q, k, v, causal(length, length))
    out, lse, stats = through_stripes(q, k, v, small(identify=method))
    assert stats.path == "sparse" and stats.density == 1.0
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", LENGTHS)
def test_theta_infinity_equals_dense(length: int) -> None:
    q, k, v = random_qkv(1, length, 2, 1, 8, torch.float64, seed=length)
    out, lse, stats = anchor_attention(q, k, v, config=small(), return_lse=True, return_stats=True)
    expected, expected_lse = dense_attention(q, k, v, causal(length, length))
    assert stats.path == "dense" and "every column" in stats.why
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (256, 256), (24, 16), (16, 40)], ids=str)
def test_dtypes_and_head_dims(dtype: torch.dtype, tolerance: float, dims: tuple[int, int]) -> None:
    q, k, v = random_qkv(1, 150, 4, 2, dims[0], dtype, v_dim=dims[1])
    expected, expected_lse = dense_attention(q, k, v, causal(150, 150))
    out, lse, _ = through_stripes(q, k, v, small())
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", ["query", "key"])
@pytest.mark.parametrize("theta", [-ALL, 0.5, 2.0, 4.0])
def test_any_theta_equals_float64_over_exactly_the_plans_pairs(method: str, share: str, theta: float) -> None:
    q, k, v = random_qkv(2, 205, 4, 2, 16, torch.float64, seed=3)
    found = plan(q, k, config=small(theta, identify=method, share=share))
    out, lse = execute(found, q, k, v, return_lse=True)
    expected, expected_lse = reference_attention(found, q, k, v)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)
    pairs = torch.stack([found.dense_mask(b, h) for b in range(2) for h in range(4)]).double().sum((1, 2)).mean()
    assert found.density == pytest.approx(float(pairs) / found.geometry.causal_pairs, abs=1e-12)
    assert (found.density < 0.9) if theta <= 0.5 else found.density <= 1.0


def test_the_reference_masks_as_plain_masked_attention_does() -> None:
    q, k, v = random_qkv(1, 90, 2, 2, 8, torch.float64)
    found = plan(q, k, config=small(1.0, share="key"))
    for head in range(2):
        mine = (x[:, :, head : head + 1] for x in (q, k, v))
        expected, _ = dense_attention(*mine, found.dense_mask(0, head))
        torch.testing.assert_close(reference_attention(found, q, k, v)[0][:, :, head : head + 1], expected)


@pytest.mark.parametrize("keys", [40, 96, 131])
@pytest.mark.parametrize("queries", [1, 13, 32, 40])
def test_queries_are_the_last_rows_of_the_keys(queries: int, keys: int) -> None:
    q, k, v = random_qkv(1, queries, 2, 1, 16, torch.float64, kv_length=keys, seed=keys)
    expected, expected_lse = dense_attention(q, k, v, causal(queries, keys))
    for config in (small(), small(1e9)):
        out, lse = anchor_attention(q, k, v, config=config, return_lse=True)
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("dtype", "score"), [(torch.float32, 60.0), (torch.float32, 300.0), (torch.float64, 2000.0)])
def test_a_stripe_may_outweigh_the_anchor_region_by_any_factor(dtype: torch.dtype, score: float) -> None:
    """e^300 is more than float32 holds, e^2000 more than float64."""
    q, k, v = random_qkv(1, 200, 2, 1, 16, dtype, seed=4)
    q[..., 0], k[..., 0], k[:, 20, :, 0] = 1.0, 0.0, 4 * score
    out, lse, _ = through_stripes(q, k, v, small(identify="every"))
    expected, expected_lse = dense_attention(q, k, v, causal(200, 200))
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [-2000.0, -200.0, 45.0, 200.0, 2000.0])
def test_scores_may_lie_anywhere(dtype: torch.dtype, offset: float) -> None:
    """Every score of every other row is moved by as much: a softmax of moved scores is what it was."""
    q, k, v = random_qkv(1, 200, 2, 1, 16, dtype, seed=7)
    q[..., 0], q[:, ::2, :, 0], k[..., 0] = 0.0, 1.0, 4 * offset
    out, lse, _ = through_stripes(q, k, v, small(identify="pooled"))
    expected, expected_lse = dense_attention(q, k, v, causal(200, 200))
    rounding = 4 * torch.finfo(dtype).eps * max(1.0, abs(offset))
    torch.testing.assert_close(out.double(), expected, atol=4 * rounding, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=rounding, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_chunks_that_end_at_groups_equal_one_call(method: str) -> None:
    q, k, v = random_qkv(1, 200, 4, 2, 16, torch.float64, seed=9)
    config = small(3.5 if method == "lse" else 1.5, identify=method, last=0)
    whole, stats = anchor_attention(q, k, v, config=config, return_stats=True)
    assert 0 < stats.stripe_density < 1
    cuts = (0, 32, 96, 160, 200)
    chunks = [anchor_attention(q[:, a:b], k[:, :b], v[:, :b], config=config) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(chunks, 1), whole, atol=1e-12, rtol=0)


def test_packed_documents_equal_one_call_each() -> None:
    cuts = [0, 70, 70, 75, 203]
    q, k, v = random_qkv(2, 203, 4, 2, 16, torch.float64)
    config = small(1.5)
    packed = anchor_attention(q, k, v, config=config, cu_seqlens=torch.tensor(cuts))
    masked = anchor_attention(q, k, v, config=config, mask=tr.Mask.documents(cuts))
    for a, b in itertools.pairwise(cuts):
        alone = anchor_attention(q[:, a:b], k[:, a:b], v[:, a:b], config=config)
        torch.testing.assert_close(packed[:, a:b], alone, atol=1e-12, rtol=0)
    assert torch.equal(packed, masked)


def test_packed_chunks_align_the_ends_of_each_document() -> None:
    q, k, v = random_qkv(1, 70, 2, 1, 16, torch.float64, kv_length=190)
    q_cuts, k_cuts = [0, 30, 70], [0, 90, 190]
    packed = anchor_attention(q, k, v, config=small(1.0), cu_seqlens=q_cuts, kv_cu_seqlens=k_cuts)
    for (a, b), (c, d) in zip(itertools.pairwise(q_cuts), itertools.pairwise(k_cuts)):
        alone = anchor_attention(q[:, a:b], k[:, c:d], v[:, c:d], config=small(1.0))
        torch.testing.assert_close(packed[:, a:b], alone, atol=1e-12, rtol=0)


def test_kept_visual_tokens_join_every_anchor_region() -> None:
    q, k, v = random_qkv(1, 160, 2, 1, 16, torch.float64)
    keep = [20, 21, 40, 100]
    found = plan(q, k, config=small(-ALL), keep=keep)
    without = plan(q, k, config=small(-ALL))
    mask = without.dense_mask(0, 0)
    for group in found.geometry.groups:
        for row in keep:
            if group.candidates[0] <= row < group.candidates[1]:
                mask[slice(*group.rows), row] = True
    assert torch.equal(found.dense_mask(0, 0), mask) and found.density > without.density
    expected, _ = reference_attention(found, q, k, v)
    torch.testing.assert_close(execute(found, q, k, v), expected, atol=1e-12, rtol=0)
    everything = anchor_attention(q, k, v, config=small(1e9), keep=keep)
    torch.testing.assert_close(everything, dense_attention(q, k, v, causal(160, 160))[0], atol=1e-12, rtol=0)


def test_grouped_heads_equal_repeated_keys() -> None:
    q, k, v = random_qkv(2, 140, 6, 2, 16, torch.float64)
    repeated = anchor_attention(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), config=small(1.0))
    torch.testing.assert_close(anchor_attention(q, k, v, config=small(1.0)), repeated, atol=1e-12, rtol=0)


def test_batch_entries_do_not_see_each_other() -> None:
    q, k, v = random_qkv(3, 140, 2, 1, 16, torch.float64)
    together = anchor_attention(q, k, v, config=small(1.0))
    for b in range(3):
        alone = anchor_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], config=small(1.0))
        torch.testing.assert_close(together[b : b + 1], alone, atol=1e-12, rtol=0)


@given(
    length=st.integers(1, 150),
    extra=st.integers(0, 60),
    block=st.integers(1, 24),
    step=st.integers(1, 6),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    method=st.sampled_from(METHODS),
    theta=st.sampled_from([-1.0, 1.0, 3.0, 1e9]),
)
def test_every_shape_equals_the_reference(length, extra, block, step, heads, method, theta) -> None:
    q, k, v = random_qkv(1, length, *heads, 8, torch.float64, kv_length=length + extra, seed=length)
    config = AnchorConfig(theta=theta, block=block, step=step, identify=method, dense="never")
    found = plan(q, k, config=config)
    out, lse = execute(found, q, k, v, return_lse=True)
    expected, expected_lse = reference_attention(found, q, k, v)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)
    if theta == 1e9:
        assert found.density == 1.0


def test_huge_logits_give_no_nan() -> None:
    q, k, v = random_qkv(1, 130, 2, 1, 16, torch.float32)
    out, lse = anchor_attention(q * 100, k * 100, v, config=small(2.0), return_lse=True)
    assert out.isfinite().all() and lse.isfinite().all()

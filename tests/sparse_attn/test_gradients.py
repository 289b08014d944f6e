"""Gradients under a fixed plan, against autograd through float64 attention over the plan's pairs."""

from __future__ import annotations

import pytest
import torch

from sparse_attn import AnchorConfig, anchor_attention, execute, plan
from tests.oracle import random_qkv


def reference(found, q, k, v):
    each = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(each, 2), v.repeat_interleave(each, 2)
    mask = torch.stack([torch.stack([found.dense_mask(b, h) for h in range(q.shape[2])]) for b in range(q.shape[0])])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.mark.parametrize("share", ["query", "key"])
@pytest.mark.parametrize("dims", [(16, 16), (16, 24)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_autograd_over_the_plans_pairs(share: str, dims: tuple[int, int], packed: bool) -> None:
    given = random_qkv(2, 130, 4, 2, dims[0], torch.float64, kv_length=150, v_dim=dims[1])
    cuts = {"cu_seqlens": [0, 60, 130], "kv_cu_seqlens": [0, 70, 150]} if packed else {}
    config = AnchorConfig(theta=1.0, block=8, step=2, share=share, dense="never")
    found = plan(*given[:2], config=config, keep=[30, 31], **cuts)
    mine, theirs = ([x.clone().requires_grad_() for x in given] for _ in range(2))
    out = execute(found, *mine)
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    out.backward(do)
    reference(found, *theirs).backward(do)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-11, rtol=0)


@pytest.mark.parametrize("theta", [1.5, float("inf")])
def test_a_call_with_gradients_uses_the_columns_it_found(theta: float) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 130, 2, 1, 16, torch.float64))
    config = AnchorConfig(theta=theta, block=8, step=4, dense="never")
    out, stats = anchor_attention(q, k, v, config=config, return_stats=True)
    out.square().sum().backward()
    other = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    reference(stats.plan, *other).square().sum().backward()
    for a, b in zip((q, k, v), other):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-11, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_have_the_inputs_dtype(dtype: torch.dtype) -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 100, 2, 1, 16, dtype))
    anchor_attention(q, k, v, config=AnchorConfig(theta=1.0, block=8, step=2, dense="never")).sum().backward()
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in (q, k, v))

"""The stand-in for `out` in backward operators, and what it does to gradients in 16 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracle import dense_attention, random_qkv
from tests.tokenring import kernel_oracles as oracles
from tokenring.kernels.cpu_flash import CpuFlashKernel
from tokenring.kernels.delta import out_of_delta


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 1e-4), (torch.float16, 1e-5)],
)
def test_its_product_with_do_is_delta(dim: int, dtype: torch.dtype, tolerance: float) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    do = random_qkv(2, 9, 3, 3, dim, dtype)[0]
    delta = random_qkv(2, 3, 9, 9, 1, wide, seed=1)[0].squeeze(-1) * do.double().norm(dim=-1).transpose(1, 2).to(wide)
    out = out_of_delta(do, delta)
    assert out.shape == do.shape and out.dtype == dtype
    got = (do.double() * out.double()).sum(-1).transpose(1, 2)
    # One dim alone has nothing to carry what rounding took.
    rounding = max(torch.finfo(dtype).eps, tolerance) if dim == 1 else tolerance
    assert ((got - delta.double()).abs() <= rounding * delta.double().abs() + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("small", [0.0, 1e-7])
def test_it_is_finite_and_carries_delta_where_half_of_a_gradient_is_zero(dtype: torch.dtype, small: float) -> None:
    for half in (slice(0, 4), slice(4, 8)):
        do = random_qkv(1, 6, 2, 2, 8, torch.float32)[0]
        do[..., half] *= small
        do = do.to(dtype)
        delta = do.float().norm(dim=-1).transpose(1, 2).contiguous()
        out = out_of_delta(do, delta)
        assert out.isfinite().all()
        got = (do.double() * out.double()).sum(-1).transpose(1, 2)
        torch.testing.assert_close(got, delta.double(), rtol=max(torch.finfo(dtype).eps, 5e-7), atol=1e-12)
    assert (out_of_delta(torch.zeros_like(do), torch.zeros_like(delta)) == 0).all()


def dq_errors(dtype: torch.dtype, keys: int, seed: int) -> tuple[float, float]:
    """Error of dq against float64, with delta alone and with the true out, over rows that see `keys` keys."""
    q, k, v = random_qkv(1, 32, 4, 4, 64, dtype, kv_length=keys, seed=seed)
    do = random_qkv(1, 32, 4, 4, 64, dtype, seed=seed + 50)[0]
    allowed = torch.ones(32, keys, dtype=torch.bool)
    out, lse = dense_attention(q, k, v, allowed, scale=0.125)
    exact = (do.double() * out).sum(-1).transpose(1, 2)
    want = oracles.gradients((q, do, lse, exact), k, v, allowed, 0.125)[0]
    delta = (do.float() * out.to(dtype).float()).sum(-1).transpose(1, 2).contiguous()
    got = CpuFlashKernel().block_backward((q, do, lse.float(), delta), k, v, None, None, 0.125, None)[0]
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    tensors = (x.transpose(1, 2) for x in (do, q, k, v, out.to(dtype)))
    true: Tensor = operator(*tensors, lse.float(), 0.0, False, scale=0.125)[0].transpose(1, 2)
    return (got - want).norm().item(), (true - want).norm().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [1, 2, 4, 16, 256])
def test_16_bit_gradients_are_as_good_as_with_the_true_out(dtype: torch.dtype, keys: int) -> None:
    errors = [dq_errors(dtype, keys, seed) for seed in range(3)]
    got, true = (sum(side) for side in zip(*errors))
    # A row of one key has no gradient at all: the true out leaves none, and delta's rounding must leave next to none.
    assert got <= 1.1 * true + 1e-3, (got, true)


@pytest.mark.parametrize(("dtype", "native"), [(torch.float16, True), (torch.bfloat16, False)])
def test_16_bit_inputs_are_computed_in_float32_where_products_would_be_emulated(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, native: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native}, raising=False)
    allowed = oracles.band(40, 40, -9, 0)
    queries, k, v = oracles.block_of_a_longer_row(40, 40, (4, 2), 16, dtype, allowed, scale=0.25)
    kernel = CpuFlashKernel()
    out, lse = kernel.block(queries[0], k, v, -9, 0, 0.25, None)
    want = dense_attention(queries[0], k, v, allowed, scale=0.25)
    assert out.dtype == dtype
    assert torch.equal(out, want[0].to(dtype)) or (out - want[0]).abs().max() <= torch.finfo(dtype).eps * 4
    torch.testing.assert_close(lse.double(), want[1], rtol=0, atol=2e-6)
    for got, exact in zip(
        kernel.block_backward(queries, k, v, -9, 0, 0.25, None), oracles.gradients(queries, k, v, allowed, 0.25)
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-5)


def test_bfloat16_stays_bfloat16_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    allowed = oracles.band(8, 8, None, 0)
    queries, k, v = oracles.block_of_a_longer_row(8, 8, (2, 1), 16, torch.bfloat16, allowed, scale=0.25)
    grads = CpuFlashKernel().block_backward(queries, k, v, None, 0, 0.25, None)
    assert all(grad.dtype == torch.bfloat16 for grad in grads)

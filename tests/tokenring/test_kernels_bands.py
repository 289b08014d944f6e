"""Bands out of full, causal and masked calls, and the CPU operator on every one of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracle import dense_attention, random_qkv
from tests.tokenring import kernel_oracles as oracles
from tokenring.kernels import bands
from tokenring.kernels.cpu_flash import CpuFlashKernel
from tokenring.kernels.reference import ReferenceKernel

SIZES = ((1, 1), (1, 4), (4, 1), (3, 3), (5, 3), (3, 6), (6, 6))


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    allowed = allowed_by(q, k, causal, mask)
    assert allowed.shape[1] and allowed.any(1).all(), "a row without a key reached the back end"
    return dense_attention(q, k, v, allowed, scale=0.5)


def differentiate(
    queries: bands.Queries, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q, do, out, lse = queries
    allowed = allowed_by(q, k, causal, mask)
    assert allowed.shape[1] and allowed.any(1).all(), "a row without a key reached the back end"
    return oracles.gradients((q, do, lse, (do * out).sum(-1).transpose(1, 2)), k, v, allowed, 0.5)


def allowed_by(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    assert not (causal and mask is not None)
    if mask is not None:
        assert mask.shape == (q.shape[1], k.shape[1]) and mask.dtype == q.dtype
        assert (mask.isneginf() | (mask == 0)).all()
        return mask == 0
    return oracles.band(q.shape[1], k.shape[1], None, 0 if causal else None)


@pytest.mark.parametrize("height", [1, 2, 64])
@pytest.mark.parametrize("longest", [1, 3, 2048])
@pytest.mark.parametrize("causal", [1, 3, None])
def test_every_band_equals_dense_attention_and_no_call_has_a_row_without_keys(
    monkeypatch: pytest.MonkeyPatch, height: int, longest: int, causal: int | None
) -> None:
    monkeypatch.setattr(bands, "MASKED_KEYS", longest)
    sizes = bands.Sizes(lambda width: height, causal)
    for rows, keys in SIZES:
        for lower, upper in oracles.bands(rows, keys):
            allowed = oracles.band(rows, keys, lower, upper)
            queries, k, v = oracles.block_of_a_longer_row(rows, keys, (2, 1), 4, torch.float64, allowed, scale=0.5)
            q, do, lse, delta = queries
            got = bands.attend(attend, sizes, q, k, v, lower, upper)
            for a, b in zip(got, dense_attention(q, k, v, allowed, scale=0.5)):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
            out = do * (delta.transpose(1, 2) / do.square().sum(-1)).unsqueeze(-1)
            grads = bands.differentiate(differentiate, sizes, (q, do, out, lse), k, v, lower, upper)
            for a, b in zip(grads, oracles.gradients(queries, k, v, allowed, 0.5)):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (4096, 256)])
def test_a_band_reads_few_keys_outside_and_masks_little_of_what_is_wide(width: int, height: int) -> None:
    read, masked = [], []

    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        read.append(q.shape[1] * k.shape[1])
        masked.append(0 if mask is None else mask.numel())
        return torch.zeros_like(q), torch.zeros(1, 1, q.shape[1])

    x = torch.zeros(1, 8192, 1, 1)
    bands.attend(call, bands.Sizes(lambda _: height), x, x, x, 1 - width, 0)
    assert sum(read) <= 8192 * (width + height)
    assert max(masked) <= height * bands.MASKED_KEYS
    assert width == 64 or sum(masked) <= sum(read) / 4


def test_a_causal_band_is_cut_to_squares_and_reads_little_of_what_it_leaves_out() -> None:
    read, longest = [], []

    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        read.append(q.shape[1] * k.shape[1])
        longest.append(q.shape[1] if causal else 0)
        return torch.zeros_like(q), torch.zeros(1, 1, q.shape[1])

    for rows in (1000, 4096):
        x = torch.zeros(1, rows, 1, 1)
        bands.attend(call, bands.Sizes(lambda _: 64, causal=128), x, x, x, None, 0)
        assert max(longest) <= 128 and sum(read) <= rows * (rows + 128) / 2
        read.clear()


def test_masks_are_made_once_for_blocks_that_lie_alike() -> None:
    masks = set()

    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        masks.add(None if mask is None else mask.data_ptr())
        return torch.zeros_like(q), torch.zeros(1, 1, q.shape[1])

    x = torch.zeros(1, 1024, 1, 1)
    bands.attend(call, bands.Sizes(lambda _: 64), x, x, x, -100, 30)
    assert len(masks) <= 5


def test_windows_as_flash_attention_says_them_hold_the_pairs_of_the_band() -> None:
    for rows, keys in SIZES:
        for lower, upper in oracles.bands(rows, keys):
            seen, left, right = bands.window(rows, keys, lower, upper)
            allowed = oracles.band(rows, keys, lower, upper)
            assert (left is None or left >= 0) and (right is None or right >= 0)
            end = seen - rows
            window = oracles.band(
                rows, seen, None if left is None else end - left, None if right is None else end + right
            )
            assert torch.equal(window, allowed[:, :seen]) and not allowed[:, seen:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_cpu_operator_runs_every_band_itself(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("cpu_flash asked the reference kernel")

    monkeypatch.setattr(ReferenceKernel, "block", fail)
    monkeypatch.setattr(ReferenceKernel, "block_backward", fail)
    kernel, atol = CpuFlashKernel(), 1e-12 if dtype == torch.float64 else 1e-5
    for rows, keys in (*SIZES, (150, 90), (70, 200)):
        found = [(None, 100), (-90, None), (-64, 20), (0, 20), (0, None)] if rows > 6 else oracles.bands(rows, keys)
        for lower, upper in found:
            allowed = oracles.band(rows, keys, lower, upper)
            if not allowed.any(1).all():
                continue
            queries, k, v = oracles.block_of_a_longer_row(rows, keys, (4, 2), 8, dtype, allowed, scale=0.5)
            out, lse = kernel.block(queries[0], k, v, lower, upper, 0.5, None)
            want = dense_attention(queries[0], k, v, allowed, scale=0.5)
            assert out.dtype == dtype
            torch.testing.assert_close(out.double(), want[0], rtol=0, atol=atol)
            torch.testing.assert_close(lse.double(), want[1], rtol=0, atol=atol)
            grads = kernel.block_backward(queries, k, v, lower, upper, 0.5, None)
            for a, b in zip(grads, oracles.gradients(queries, k, v, allowed, 0.5)):
                torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=atol * 20)


@pytest.mark.parametrize("window", [64, 300, 1500])
def test_long_windows_of_the_cpu_operator_equal_the_reference(window: int) -> None:
    q, k, v = random_qkv(1, 2600, 2, 1, 16, torch.float32)
    do = random_qkv(1, 2600, 2, 1, 16, torch.float32, seed=1)[0]
    for lower, upper in ((1 - window, 0), (-window, window // 3), (-window, None)):
        results = []
        for kernel in (CpuFlashKernel(), ReferenceKernel()):
            out, lse = kernel.block(q, k, v, lower, upper, 0.25, None)
            delta = (out * do).sum(-1).transpose(1, 2).contiguous()
            results.append((out, lse, *kernel.block_backward((q, do, lse, delta), k, v, lower, upper, 0.25, None)))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_windows_repeat_bit_for_bit() -> None:
    q, k, v = random_qkv(1, 700, 2, 1, 16, torch.float32)
    kernel = CpuFlashKernel()
    runs = []
    for _ in range(2):
        out, lse = kernel.block(q, k, v, -150, 20, 0.25, None)
        delta = (out * q).sum(-1).transpose(1, 2).contiguous()
        runs.append((out, lse, *kernel.block_backward((q, q, lse, delta), k, v, -150, 20, 0.25, None)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))

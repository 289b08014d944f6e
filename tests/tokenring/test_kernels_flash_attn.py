"""The flash-attn adapters on stand-in modules that have the packages' public signatures and compute densely in float64."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import dense_attention
from tests.tokenring import kernel_oracles as oracles
from tokenring.kernels import backward_kernel, choose
from tokenring.kernels import flash_attn as adapters
from tokenring.kernels.cuda_sdpa import CudaSdpaKernel
from tokenring.kernels.flash_attn import FlashAttnKernel
from tokenring.kernels.reference import ReferenceKernel

SIZES = ((1, 1), (1, 4), (4, 1), (3, 3), (5, 3), (3, 6))
MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: tuple, softcap: float) -> tuple:
    """What all versions document: the window's diagonal ends in the last query and the last key."""
    assert q.shape[3] == k.shape[3] == v.shape[3] and q.shape[3] % 8 == 0
    assert k.shape == v.shape and k.shape[2] <= q.shape[2]
    rows, keys = q.shape[1], k.shape[1]
    left, right = (None if side in (None, -1) else side for side in window)
    if causal:
        right = 0
    end = keys - rows
    allowed = oracles.band(rows, keys, None if left is None else end - left, None if right is None else end + right)
    assert allowed.any(1).all(), "a row without a key reached flash-attn"
    out, lse = dense_attention(q, k, v, allowed, scale=scale, softcap=softcap or None)
    return out.to(q.dtype), lse.float()


def version_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> tuple:
    assert softmax_scale is not None and return_attn_probs and None not in window_size
    return *dense(q, k, v, softmax_scale, causal, window_size, softcap), None


def version_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> tuple:
    assert softmax_scale is not None and return_attn_probs and None not in window_size
    return dense(q, k, v, softmax_scale, causal, window_size, softcap)


def version_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    deterministic: bool = False,
    return_lse: bool = False,
) -> tuple:
    assert softmax_scale is not None and return_lse and -1 not in window_size and k is not v
    return dense(q, k, v, softmax_scale, causal, window_size, softcap)


FUNCTIONS = {2: version_2, 3: version_3, 4: version_4}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    def put(version: int, function: Callable | None) -> None:
        module = ModuleType(MODULES[version])
        if function is not None:
            module.flash_attn_func = function
        monkeypatch.setitem(sys.modules, MODULES[version], module if function is not None else None)
        adapters._function.cache_clear()

    for version in MODULES:
        put(version, None)
    yield put
    monkeypatch.undo()
    adapters._function.cache_clear()


def kernel_of(version: int, capability: tuple[int, int] = (9, 0)) -> FlashAttnKernel:
    partners = (CudaSdpaKernel(capability=lambda device: capability), ReferenceKernel())
    return FlashAttnKernel(version, lambda device: capability, partners)


def described(dtype: torch.dtype = torch.float16, dim: int = 64, device: str = "cuda:0") -> Any:
    return SimpleNamespace(dtype=dtype, device=torch.device(device), shape=(1, 4, 2, dim))


@pytest.mark.parametrize("version", [2, 3, 4])
def test_every_band_is_one_call_of_every_version(install: Callable, version: int) -> None:
    calls = []

    def noted(*args: Any, **named: Any) -> tuple:
        calls.append(named)
        return FUNCTIONS[version](*args, **named)

    noted.__signature__ = inspect.signature(FUNCTIONS[version])
    install(version, noted)
    kernel = kernel_of(version)
    for rows, keys in SIZES:
        for bounds in oracles.bands(rows, keys):
            allowed = oracles.band(rows, keys, *bounds)
            (q, *_), k, v = oracles.block_of_a_longer_row(rows, keys, (4, 2), 12, torch.float16, allowed, scale=0.3)
            calls.clear()
            out, lse = kernel.block(q, k, v, *bounds, 0.3, None)
            assert len(calls) == 1 and out.dtype == torch.float16 and lse.dtype == torch.float32
            want = dense_attention(q, k, v, allowed, scale=0.3)
            torch.testing.assert_close(out.double(), want[0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(lse.double(), want[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_a_causal_block_is_said_to_be_causal(install: Callable, version: int) -> None:
    seen: list[tuple] = []

    def noted(*args: Any, **named: Any) -> tuple:
        seen.append((named["causal"], named["window_size"]))
        return FUNCTIONS[version](*args, **named)

    noted.__signature__ = inspect.signature(FUNCTIONS[version])
    install(version, noted)
    x = torch.ones(1, 4, 2, 8, dtype=torch.float16)
    for bounds in ((None, 0), (None, None), (-2, 1)):
        kernel_of(version).block(x, x, x, *bounds, 0.3, None)
    none = None if version == 4 else -1
    assert seen == [(True, (none, none)), (False, (none, none)), (False, (2, 1))]


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("dims", [(8, 8), (20, 12), (5, 24)])
def test_softcap_scale_groups_and_two_head_dims(install: Callable, version: int, dims: tuple[int, int]) -> None:
    install(version, FUNCTIONS[version])
    allowed = oracles.band(5, 7, -1, 2)
    for softcap in (None, 1.5):
        options = {"scale": 0.7, "softcap": softcap, "v_dim": dims[1]}
        queries, k, v = oracles.block_of_a_longer_row(5, 7, (6, 2), dims[0], torch.bfloat16, allowed, **options)
        out, lse = kernel_of(version).block(queries[0], k, v, -1, 2, 0.7, softcap)
        want = dense_attention(queries[0], k, v, allowed, scale=0.7, softcap=softcap)
        assert out.shape == (2, 5, 6, dims[1])
        torch.testing.assert_close(out.double(), want[0], rtol=8e-3, atol=8e-3)
        torch.testing.assert_close(lse.double(), want[1], rtol=0, atol=1e-5)
        grads = kernel_of(version).block_backward(queries, k, v, -1, 2, 0.7, softcap)
        for got, exact in zip(grads, oracles.gradients(queries, k, v, allowed, 0.7, softcap)):
            torch.testing.assert_close(got.double(), exact, rtol=2e-2, atol=2e-2)


def test_version_4_differentiates_every_band_of_a_longer_row_through_its_lse(install: Callable) -> None:
    install(4, version_4)
    kernel = kernel_of(4)
    for rows, keys in SIZES:
        for bounds in oracles.bands(rows, keys):
            allowed = oracles.band(rows, keys, *bounds)
            queries, k, v = oracles.block_of_a_longer_row(rows, keys, (4, 2), 8, torch.float16, allowed, scale=0.3)
            assert kernel.backward_kernel(queries[0], v, None) is kernel
            with torch.no_grad():
                grads = kernel.block_backward(queries, k, v, *bounds, 0.3, None)
            for got, exact in zip(grads, oracles.gradients(queries, k, v, allowed, 0.3)):
                assert not got.requires_grad
                torch.testing.assert_close(got.double(), exact, rtol=4e-3, atol=4e-3)


def test_a_version_4_that_does_not_differentiate_its_lse_is_told_to_be_upgraded(install: Callable) -> None:
    def older(*args: Any, **named: Any) -> tuple:
        out, lse = version_4(*args, **named)
        return out, lse.detach()

    older.__signature__ = inspect.signature(version_4)
    install(4, older)
    allowed = oracles.band(3, 3, None, 0)
    queries, k, v = oracles.block_of_a_longer_row(3, 3, (2, 2), 8, torch.float16, allowed, scale=0.3)
    with pytest.raises(ValueError, match=r'upgrade flash-attn-4 to 4\.0\.0b5 or later, or use kernel="cuda_sdpa"'):
        kernel_of(4).block_backward(queries, k, v, None, 0, 0.3, None)


@pytest.mark.parametrize(
    ("version", "capability", "dim", "softcap", "name"),
    [
        (2, (9, 0), 64, None, "cuda_sdpa"),
        (3, (9, 0), 64, None, "cuda_sdpa"),
        (2, (9, 0), 64, 2.0, "reference"),
        (4, (9, 0), 64, 2.0, "flash_attn4"),
        (4, (8, 0), 64, None, "cuda_sdpa"),
        (4, (12, 0), 64, None, "cuda_sdpa"),
        (4, (9, 0), 256, None, "cuda_sdpa"),
    ],
)
def test_the_kernel_of_the_backward_has_a_name(
    install: Callable, version: int, capability: tuple[int, int], dim: int, softcap: float | None, name: str
) -> None:
    q = described(dim=dim)
    assert backward_kernel(kernel_of(version, capability), q, q, softcap).name == name


def test_that_kernel_runs_the_backward(install: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    install(2, version_2)
    kernel = kernel_of(2)
    allowed = oracles.band(3, 4, None, 1)
    queries, k, v = oracles.block_of_a_longer_row(3, 4, (2, 1), 8, torch.float16, allowed, scale=0.3)
    assert backward_kernel(kernel, queries[0], v, None).name == "reference"
    said = []
    monkeypatch.setattr(ReferenceKernel, "block_backward", lambda self, *args: said.append(args))
    kernel.block_backward(queries, k, v, None, 1, 0.3, None)
    assert said == [(queries, k, v, None, 1, 0.3, None)]


def test_what_a_version_refuses_it_says(install: Callable) -> None:
    half = described()
    assert "flash_attn cannot be imported" in kernel_of(2).refuses(half, half, None)
    for version in MODULES:
        install(version, FUNCTIONS[version])
        assert kernel_of(version).refuses(half, half, 2.0) is None
    assert "not torch.float32 on cuda" in kernel_of(2).refuses(described(torch.float32), half, None)
    assert "not torch.float16 on cpu" in kernel_of(2).refuses(described(device="cpu"), half, None)
    assert "from 9.0 to below 10.0, and cuda:0 has 8.0" in kernel_of(3, (8, 0)).refuses(half, half, None)
    assert "head dims up to 256 on cuda:0, not 264" in kernel_of(2).refuses(described(dim=264), half, None)
    assert "head dims up to 128 on cuda:0, not 192" in kernel_of(4, (10, 0)).refuses(half, described(dim=192), None)

    def older(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size: tuple) -> tuple:
        raise AssertionError("called")

    install(3, older)
    assert "has no return_attn_probs, softcap; install a later version" in kernel_of(3).refuses(half, half, None)


def test_names_choose_the_newest_version_that_takes_the_call(
    install: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = described()
    assert choose("auto", half, half, None).name == "cuda_sdpa"
    with pytest.raises(ValueError, match=r"flash_attn4: .*flash_attn3: .*flash_attn2: .*cannot be imported"):
        choose("flash_attn", half, half, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("tokenring.kernels.GPU_KERNELS", (kernel_of(4), kernel_of(3), kernel_of(2)))
    install(2, version_2)
    assert choose("flash_attn", half, half, None).name == "flash_attn2"
    install(3, version_3)
    assert choose("flash_attn", half, half, None).name == "flash_attn3"
    install(4, version_4)
    assert choose("auto", half, half, None).name == "flash_attn4"
    assert choose("flash_attn2", half, half, None).name == "flash_attn2"

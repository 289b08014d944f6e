"""torch's CUDA operators behind `cuda_sdpa`: on stand-ins that hold torch's own schemas, on meta tensors, and where there is a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import dense_attention, random_qkv
from tests.tokenring import kernel_oracles as oracles
from tokenring.kernels.cuda_sdpa import CudaSdpaKernel
from tokenring.kernels.reference import ReferenceKernel

SIZES = ((1, 1), (1, 4), (4, 1), (3, 3), (5, 3), (3, 6))


def bind(name: str, positional: tuple, named: dict[str, Any]) -> SimpleNamespace:
    """The arguments by the names that torch's schema gives them; an argument that it does not know fails."""
    schema = getattr(torch.ops.aten, name).default._schema
    free = [a.name for a in schema.arguments if not a.kwarg_only]
    assert len(positional) <= len(free)
    given = dict(zip(free, positional)) | named
    assert given.keys() <= {a.name for a in schema.arguments}
    for argument in schema.arguments:
        if argument.name not in given:
            assert argument.has_default_value(), f"{name} needs {argument.name}"
            given[argument.name] = argument.default_value
            continue
        kind, value = str(argument.type), given[argument.name]
        if value is None:
            # The pair of lengths is None by position for dense tensors; `test_flash_takes_meta_tensors` has torch agree.
            assert kind.startswith("Optional") or argument.name.startswith("cum_seq")
        elif "Tensor" in kind:
            assert isinstance(value, Tensor)
        else:
            assert isinstance(
                value, {"bool": bool, "float": float}.get(kind.removeprefix("Optional[").rstrip("]"), int)
            )
    return SimpleNamespace(**given)


class Operators:
    """What the four operators are known to want and to do, on the CPU in float64; it keeps every call."""

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []

    def _flash_attention_forward(self, *positional: Any, **named: Any) -> tuple:
        call = self.note("_flash_attention_forward", positional, named)
        allowed = self.flash_pairs(call)
        out, lse = dense_attention(call.query, call.key, call.value, allowed, scale=call.scale)
        seed = torch.zeros(2, dtype=torch.uint64)
        return out.to(call.query.dtype), lse.float(), seed, torch.zeros((), dtype=torch.uint64), torch.empty(0)

    def _flash_attention_backward(self, *positional: Any, **named: Any) -> tuple:
        call = self.note("_flash_attention_backward", positional, named)
        assert call.rng_state.shape == (2,) and call.rng_state.dtype == torch.uint64
        return self.gradients(call, self.flash_pairs(call), call.logsumexp, call.scale)

    def _efficient_attention_forward(self, *positional: Any, **named: Any) -> tuple:
        call = self.note("_efficient_attention_forward", positional, named)
        out, lse = dense_attention(call.query, call.key, call.value, self.efficient_pairs(call), scale=call.scale)
        assert call.compute_log_sumexp
        rows = -(-call.query.shape[1] // 32) * 32
        full = torch.full((*lse.shape[:2], rows), torch.inf)
        full[..., : lse.shape[2]] = lse
        seed = torch.zeros((), dtype=torch.int64)
        return out.to(call.query.dtype), full, seed, seed, call.query.shape[1], call.key.shape[1]

    def _efficient_attention_backward(self, *positional: Any, **named: Any) -> tuple:
        call = self.note("_efficient_attention_backward", positional, named)
        rows = call.query.shape[1]
        assert call.logsumexp.shape[2] % 32 == 0 and call.logsumexp.is_contiguous()
        assert torch.isposinf(call.logsumexp[..., rows:]).all()
        assert (call.max_seqlen_q, call.max_seqlen_k) == (rows, call.key.shape[1]) and not call.bias_requires_grad
        grads = self.gradients(call, self.efficient_pairs(call), call.logsumexp[..., :rows], call.scale)
        return *grads, torch.empty(0)

    def note(self, name: str, positional: tuple, named: dict[str, Any]) -> SimpleNamespace:
        call = bind(name, positional, named)
        call.name = name
        self.calls.append(call)
        shapes = [x.shape for x in (call.query, call.key, call.value)]
        assert call.dropout_p == 0.0
        assert all(len(shape) == 4 and shape[3] % 8 == 0 and shape[1] > 0 for shape in shapes)
        assert shapes[1] == shapes[2] and shapes[0][3] == shapes[1][3]
        assert all(x.stride(-1) == 1 for x in (call.query, call.key, call.value))
        return call

    def flash_pairs(self, call: SimpleNamespace) -> Tensor:
        rows, keys = call.query.shape[1], call.key.shape[1]
        assert call.query.dtype in (torch.float16, torch.bfloat16) and call.query.shape[3] <= 256
        assert (call.cum_seq_q, call.cum_seq_k, call.max_q, call.max_k) == (None, None, rows, keys)
        left, right = call.window_size_left, call.window_size_right
        if call.is_causal:
            right = 0
        end = keys - rows
        allowed = oracles.band(rows, keys, None if left < 0 else end - left, None if right < 0 else end + right)
        assert allowed.any(1).all(), "a row without a key reached the operator"
        return allowed

    def efficient_pairs(self, call: SimpleNamespace) -> Tensor:
        rows, keys, heads = call.query.shape[1], call.key.shape[1], call.query.shape[2]
        assert call.key.shape[2] == heads, "the operator wants one key head per query head"
        assert call.custom_mask_type in (0, 1) and (call.cu_seqlens_q, call.cu_seqlens_k) == (None, None)
        allowed = oracles.band(rows, keys, None, 0 if call.custom_mask_type else None)
        if call.bias is not None:
            assert call.bias.shape == (call.query.shape[0], heads, rows, keys) and call.bias.dtype == call.query.dtype
            assert call.bias.stride(3) == 1 and (rows == 1 or call.bias.stride(2) % 16 == 0)
            allowed &= call.bias[0, 0] == 0
        assert allowed.any(1).all(), "a row without a key reached the operator"
        return allowed

    def gradients(self, call: SimpleNamespace, allowed: Tensor, lse: Tensor, scale: float) -> tuple:
        do = call.grad_out if hasattr(call, "grad_out") else call.grad_out_
        assert lse.dtype == torch.float32 and lse.shape == (do.shape[0], do.shape[2], do.shape[1])
        assert call.out.shape == do.shape == call.query.shape and call.out.dtype == do.dtype == call.query.dtype
        delta = (do.double() * call.out.double()).sum(-1).transpose(1, 2)
        grads = oracles.gradients((call.query, do, lse, delta), call.key, call.value, allowed, scale)
        return tuple(grad.to(call.query.dtype) for grad in grads)


def kernel_on_stand_ins(capability: tuple[int, int] = (9, 0)) -> tuple[CudaSdpaKernel, Operators]:
    operators = Operators()
    return CudaSdpaKernel(operators, lambda device: capability), operators


def check(
    kernel: Any, rows: int, keys: int, bounds: tuple, dtype: torch.dtype, heads: tuple[int, int], dims: tuple[int, int]
) -> None:
    """Forward and backward of one block equal dense attention in float64."""
    allowed = oracles.band(rows, keys, *bounds)
    queries, k, v = oracles.block_of_a_longer_row(rows, keys, heads, dims[0], dtype, allowed, scale=0.3, v_dim=dims[1])
    # What whole rows tell a block: rows of longer tensors, so not contiguous.
    queries = tuple(torch.cat([x, x], dim=1 + i // 2).narrow(1 + i // 2, 0, rows) for i, x in enumerate(queries))
    out, lse = kernel.block(queries[0], k, v, *bounds, 0.3, None)
    want = dense_attention(queries[0], k, v, allowed, scale=0.3)
    tolerance = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert out.dtype == dtype and out.shape == (*queries[0].shape[:3], dims[1]) and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want[1], rtol=0, atol=2e-5)
    grads = kernel.block_backward(queries, k, v, *bounds, 0.3, None)
    for got, exact, like in zip(grads, oracles.gradients(queries, k, v, allowed, 0.3), (queries[0], k, v)):
        assert got.shape == like.shape and got.dtype in (dtype, torch.float32)
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_band_reaches_the_operators_as_they_want_it(dtype: torch.dtype) -> None:
    kernel, operators = kernel_on_stand_ins()
    for rows, keys in SIZES:
        for bounds in oracles.bands(rows, keys):
            check(kernel, rows, keys, bounds, dtype, (4, 2), (16, 16))
    flash = {call.name.startswith("_flash") for call in operators.calls}
    assert flash == {dtype != torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dims", [(5, 5), (16, 8), (8, 24), (200, 100)])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)])
def test_heads_are_filled_up_and_groups_summed(
    dtype: torch.dtype, dims: tuple[int, int], heads: tuple[int, int]
) -> None:
    kernel, operators = kernel_on_stand_ins()
    for bounds in ((None, None), (None, 0), (None, 2), (-2, 1)):
        check(kernel, 5, 7, bounds, dtype, heads, dims)
    widths = {call.query.shape[3] for call in operators.calls}
    assert widths == {{5: 8, 16: 16, 8: 24, 200: 256}[dims[0]]}
    grouped = {call.key.shape[2] for call in operators.calls}
    assert grouped == {heads[0] if dtype == torch.float32 else heads[1]}


def test_each_band_of_flash_is_one_call_and_causal_is_said_to_be() -> None:
    kernel, operators = kernel_on_stand_ins()
    q, k, v = random_qkv(1, 6, 2, 2, 8, torch.float16, kv_length=8)
    said = []
    for bounds in ((None, None), (None, 2), (None, 0), (-3, 1)):
        operators.calls.clear()
        kernel.block(q, k, v, *bounds, 0.3, None)
        (call,) = operators.calls
        said.append((call.key.shape[1], call.is_causal, call.window_size_left, call.window_size_right))
    # Keys that no row sees are left out, so that the diagonal ends in the last query and the last key.
    assert said == [(8, False, -1, -1), (8, True, -1, 0), (6, True, -1, 0), (7, False, 4, 0)]


@pytest.mark.parametrize(
    ("dtype", "dim", "capability", "flash"),
    [
        (torch.float16, 64, (8, 0), True),
        (torch.float16, 64, (7, 5), False),
        (torch.float16, 264, (9, 0), False),
        (torch.float32, 64, (9, 0), False),
    ],
)
def test_the_operator_fits_device_dtype_and_head_dim(
    dtype: torch.dtype, dim: int, capability: tuple[int, int], flash: bool
) -> None:
    kernel, operators = kernel_on_stand_ins(capability)
    check(kernel, 3, 4, (None, 1), dtype, (2, 1), (dim, dim))
    assert {call.name.startswith("_flash") for call in operators.calls} == {flash}


def described(dtype: torch.dtype, dim: int = 64, device: str = "cuda:0") -> Any:
    return SimpleNamespace(dtype=dtype, device=torch.device(device), shape=(1, 4, 2, dim))


def test_what_it_refuses_it_says() -> None:
    kernel, _ = kernel_on_stand_ins((7, 5))
    half = described(torch.float16)
    assert kernel.refuses(half, half, None) is None
    assert kernel.refuses(described(torch.float32), described(torch.float32, 8), None) is None
    assert "no softcap" in kernel.refuses(half, half, 2.0)
    assert "bfloat16 needs compute capability 8.0, and cuda:0 has 7.5" in kernel.refuses(
        described(torch.bfloat16), half, None
    )
    assert "not torch.float64 on cuda" in kernel.refuses(described(torch.float64), half, None)
    assert "not torch.float16 on cpu" in kernel.refuses(described(torch.float16, device="cpu"), half, None)
    bare = CudaSdpaKernel(SimpleNamespace(), lambda device: (9, 0))
    assert "lacks _flash_attention_forward, _flash_attention_backward" in bare.refuses(half, half, None)


def test_a_rocm_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    kernel, _ = kernel_on_stand_ins()
    half = described(torch.float16)
    assert "built for ROCm" in kernel.refuses(half, half, None)


def test_flash_takes_meta_tensors() -> None:
    """torch's own operators accept the calls and promise the shapes that the kernel hands on."""
    kernel = CudaSdpaKernel(capability=lambda device: (9, 0))
    q, k, v = (x.to("meta") for x in random_qkv(2, 6, 4, 2, 20, torch.bfloat16, kv_length=9, v_dim=12))
    lse = torch.empty(2, 4, 6, device="meta")
    for bounds in ((None, None), (None, 0), (None, 3), (-2, 1)):
        out, own = kernel.block(q, k, v, *bounds, 0.3, None)
        assert out.shape == (2, 6, 4, 12) and own.shape == lse.shape and own.dtype == torch.float32
        grads = kernel.block_backward((q, out, lse, lse), k, v, *bounds, 0.3, None)
        assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


def test_efficient_takes_meta_tensors() -> None:
    """Forward only: the shape function of torch 2.13's backward operator lacks an argument of its own schema."""
    kernel = CudaSdpaKernel(capability=lambda device: (9, 0))
    q, k, v = (x.to("meta") for x in random_qkv(2, 40, 4, 2, 20, torch.float32, kv_length=45, v_dim=12))
    for bounds in ((None, None), (None, 0), (None, 5), (-2, 1)):
        out, lse = kernel.block(q, k, v, *bounds, 0.3, None)
        assert out.shape == (2, 40, 4, 12) and lse.shape == (2, 4, 40) and lse.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_equals_the_reference(dtype: torch.dtype) -> None:
    kernel = CudaSdpaKernel()
    for rows, keys in ((1, 1), (7, 5), (70, 200), (600, 600)):
        for bounds in ((None, None), (None, 0), (None, 3), (-2, None), (-64, 20), (-300, 0)):
            allowed = oracles.band(rows, keys, *bounds)
            if not allowed.any(1).all():
                continue
            for heads, dims in (((4, 2), (64, 64)), ((6, 6), (40, 24)), ((4, 1), (200, 200))):
                queries, k, v = oracles.block_of_a_longer_row(
                    rows, keys, heads, dims[0], dtype, allowed, scale=0.1, v_dim=dims[1]
                )
                queries, k, v = tuple(x.cuda() for x in queries), k.cuda(), v.cuda()
                assert kernel.refuses(queries[0], v, None) is None
                results = []
                for each in (kernel, ReferenceKernel()):
                    forward = each.block(queries[0], k, v, *bounds, 0.1, None)
                    results.append((*forward, *each.block_backward(queries, k, v, *bounds, 0.1, None)))
                tolerance = 1e-3 if dtype == torch.float32 else 3e-2
                for a, b in zip(*results):
                    torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance)

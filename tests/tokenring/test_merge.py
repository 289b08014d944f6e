"""The online-softmax merge: in torch operations, and as one Triton kernel in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokenring.merge
from tests.oracle import dense_attention, random_qkv
from tokenring.merge import merge_, merge_sinks_

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("dtype", "part_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, 5e-3),
    ],
)
@pytest.mark.parametrize("piece", [1, 50, 2**19])
def test_two_halves_of_the_keys_merge_to_the_attention_over_all(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, part_dtype: torch.dtype, tolerance: float, piece: int
) -> None:
    monkeypatch.setattr(tokenring.merge, "_CONVERTED", piece)
    q, k, v = random_qkv(2, 9, 3, 3, 5, torch.float64, kv_length=8)
    allowed = torch.ones(9, 8, dtype=torch.bool)
    want = dense_attention(q, k, v, allowed)
    (out, lse), (part, part_lse) = (
        dense_attention(q, k[:, at], v[:, at], allowed[:, at]) for at in (slice(5), slice(5, 8))
    )
    out, lse, part, part_lse = out.to(dtype), lse.to(dtype), part.to(part_dtype), part_lse.to(dtype)
    # A tile's rows are a slice of a longer tensor.
    wide, wide_lse = torch.cat([out, out], 1), torch.cat([lse, lse], 2)
    merge_(wide[:, 4:13], wide_lse[:, :, 4:13], torch.cat([part[:, 4:], part[:, :4]], 1), part_lse.roll(-4, 2))
    rolled = want[0].roll(-4, 1), want[1].roll(-4, 2)
    torch.testing.assert_close(wide[:, 4:13].double(), rolled[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(wide_lse[:, :, 4:13].double(), rolled[1], rtol=0, atol=tolerance)
    assert torch.equal(wide[:, :4], out[:, :4]) and torch.equal(wide_lse[:, :, 13:], lse[:, :, 4:])


def test_merging_empty_partials_makes_no_nan() -> None:
    out, lse = torch.zeros(1, 2, 1, 4), torch.full((1, 1, 2), -torch.inf)
    part, part_lse = torch.ones(1, 2, 1, 4), torch.tensor([[[0.5, -torch.inf]]])
    part[:, 1] = 0
    merge_(out, lse, torch.zeros_like(out), torch.full_like(lse, -torch.inf))
    assert (out == 0).all() and torch.isneginf(lse).all()
    merge_(out, lse, part, part_lse)
    assert torch.equal(out, part) and torch.equal(lse, part_lse)
    merge_(out, lse, torch.zeros_like(out), torch.full_like(lse, -torch.inf))
    assert torch.equal(out, part) and torch.equal(lse, part_lse)


def test_merging_far_apart_partials_does_not_overflow() -> None:
    out, lse = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), 300.0)
    merge_(out, lse, torch.full((1, 1, 1, 2), 7.0), torch.full((1, 1, 1), -300.0))
    assert torch.equal(out, torch.ones(1, 1, 1, 2)) and lse.item() == 300.0


def test_a_sink_leaves_empty_rows_empty() -> None:
    out, lse = torch.ones(1, 2, 1, 2), torch.tensor([[[0.0, -torch.inf]]])
    out[:, 1] = 0
    merge_sinks_(out, lse, torch.tensor([0.0]))
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(lse[0, 0], torch.tensor([0.6931472, -torch.inf]))


def test_a_sink_of_minus_infinity_changes_nothing() -> None:
    out, lse = torch.ones(1, 2, 1, 2), torch.tensor([[[0.5, -torch.inf]]])
    out[:, 1] = 0
    merge_sinks_(out, lse, torch.tensor([-torch.inf]))
    assert torch.equal(out[0, :, 0, 0], torch.tensor([1.0, 0.0])) and lse[0, 0].tolist() == [0.5, -torch.inf]


TRITON = """
import torch
from tokenring.kernels.triton_merge import merge_ as fused
from tokenring.merge import merge_

make = torch.Generator().manual_seed(0)
for dtype, part_dtype in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float64)):
    for rows, dims in ((1, 1), (37, 20), (130, 64)):
        out = torch.randn(2, rows + 9, 3, dims, dtype=dtype, generator=make)[:, 5 : 5 + rows]
        lse = 20 * torch.randn(2, 3, rows + 9, dtype=dtype, generator=make)[:, :, 5 : 5 + rows]
        part = torch.randn(2, rows, dims, 3, generator=make).to(part_dtype).transpose(2, 3)
        part = part if rows == 37 else part.contiguous()
        part_lse = 20 * torch.randn(2, 3, rows, dtype=dtype, generator=make)
        for sample, tensors in enumerate((((out, lse),), ((part, part_lse),), ((out, lse), (part, part_lse)))):
            for x, x_lse in tensors:  # empty on one side, the other, both
                x[0, sample % rows, 1], x_lse[0, 1, sample % rows] = 0, -torch.inf
        want, want_lse, untouched = out.clone(), lse.clone(), (part.clone(), part_lse.clone())
        merge_(want, want_lse, part, part_lse)
        fused(out, lse, part, part_lse)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse, want_lse, rtol=tolerance, atol=tolerance)
        assert torch.equal(part, untouched[0]) and torch.equal(part_lse, untouched[1])
        assert not rows > 2 or torch.isneginf(lse[0, 1, 2]) and (out[0, 2, 1] == 0).all()
for near, far in ((300.0, -300.0), (-300.0, 300.0)):  # the smaller share is 0, and nothing of its values may be left
    out, part = (torch.full((1, 1, 1, 2), 1.0 if x > 0 else 1e8) for x in (near, far))
    fused(out, torch.full((1, 1, 1), near), part, torch.full((1, 1, 1), far))
    assert (out == 1.0).all()
fused(torch.zeros(1, 0, 2, 4), torch.zeros(1, 2, 0), torch.zeros(1, 0, 2, 4), torch.zeros(1, 2, 0))
print("equal")
"""

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from tokenring.kernels.triton_merge import _merge

for wide, part in (("fp32", "bf16"), ("fp64", "fp64")):
    signature = dict.fromkeys(_merge.arg_names, "i32")
    signature |= {"out": f"*{wide}", "lse": f"*{wide}", "part_out": f"*{part}", "part_lse": f"*{wide}"}
    signature |= {"ROWS": "constexpr", "DIMS": "constexpr"}
    source = ASTSource(fn=_merge, signature=signature, constexprs={"ROWS": 16, "DIMS": 64})
    assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
print("compiled")
"""


def run(code: str, cache: Path, **environment: str) -> str:
    """In a process of its own: Triton reads the environment when the kernel is defined."""
    environment = os.environ | environment | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.strip()


def test_the_triton_kernel_equals_the_torch_operations(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton, which the dev extra installs on Linux")
    assert run(TRITON, tmp_path, TRITON_INTERPRET="1") == "equal"


def test_the_triton_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs triton, which the dev extra installs on Linux")
    assert run(COMPILE, tmp_path) == "compiled"


def test_cuda_tensors_take_the_triton_kernel_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda(torch.Tensor):
        is_cuda = True

    calls = []
    monkeypatch.setattr(tokenring.merge, "_fused", lambda: lambda *tensors: calls.append(tensors))
    tensors = (torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 2), torch.ones(1, 2, 1, 4), torch.zeros(1, 1, 2))
    out = tensors[0].clone().as_subclass(OnCuda)
    merge_(out, *tensors[1:])
    assert len(calls) == 1 and calls[0][0] is out and calls[0][1:] == tensors[1:] and (out == 0).all()
    merge_(*tensors)
    assert len(calls) == 1 and (tensors[0] == 0.5).all()

"""The Triton kernel in Triton's interpreter, against its torch twin. Needs the package triton; its absence is a failure here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_attn import AnchorConfig, execute, plan
from tests.oracle import random_qkv

ROOT = Path(__file__).parents[2]

TWIN = """
import torch
from sparse_attn import AnchorConfig, execute, plan
from tests.oracle import random_qkv

cases = [
    # dtype, batch, rows, keys, heads, dims, share, tolerance
    (torch.float32, 2, 150, 150, (4, 2), (16, 16), "query", 2e-6),
    (torch.float32, 1, 131, 170, (4, 2), (24, 40), "key", 2e-6),
    (torch.float64, 1, 97, 97, (3, 1), (8, 8), "query", 1e-12),
    (torch.float16, 1, 150, 150, (2, 1), (64, 64), "query", 2e-3),
]
for dtype, batch, rows, keys, heads, dims, share, tolerance in cases:
    q, k, v = random_qkv(batch, rows, *heads, dims[0], dtype, kv_length=keys, v_dim=dims[1])
    config = AnchorConfig(theta=1.5, identify="every", block=8, step=3, share=share, dense="never")
    found = plan(q, k, config=config)
    assert 0 < found.stripe_density < 1
    want, want_lse = execute(found, q, k, v, return_lse=True)
    out, lse = execute(found, q, k, v, kernel="triton", return_lse=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out, want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, want_lse, atol=tolerance, rtol=tolerance)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(execute(found, *strided, kernel="triton"), out)
print("equal")
"""


def interpreted(code: str, cache: Path) -> str:
    """In a process of its own: Triton reads the environment when a kernel is defined."""
    extra = {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, env=os.environ | extra, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.strip()


def test_the_triton_kernel_equals_its_torch_twin(tmp_path: Path) -> None:
    assert interpreted(TWIN, tmp_path) == "equal"


@pytest.mark.parametrize("sizes", [{"rows": 8}, {"rows": 48}, {"columns": 17}], ids=str)
def test_tiles_that_triton_cannot_take_are_refused(sizes: dict[str, int]) -> None:
    from sparse_attn.kernels.triton_stripes import TritonKernel

    q, _, v = random_qkv(1, 40, 1, 1, 16, torch.float32)
    with pytest.raises(ValueError, match="power of two"):
        TritonKernel("auto", q, v, 0.25, **sizes)


def test_flashinfer_says_what_it_needs() -> None:
    q, k, v = random_qkv(1, 100, 1, 1, 16, torch.float32)
    found = plan(q, k, config=AnchorConfig(theta=1.0, block=8, step=2, dense="never"))
    with pytest.raises(ValueError, match="flashinfer"):
        execute(found, q, k, v, kernel="flashinfer")

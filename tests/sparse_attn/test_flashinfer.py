"""The FlashInfer executor against a stand-in with the documented interface: FlashInfer itself needs a GPU."""

from __future__ import annotations

import importlib
import math
import sys
from types import ModuleType

import pytest
import torch

from sparse_attn import AnchorConfig, execute, plan
from tests.oracle import random_qkv

NAME = "sparse_attn.kernels.flashinfer_stripes"


class Wrapper:
    """Block-sparse attention by its definition: rows (M, Hq, D) over the blocks that indptr and indices name; lse in base 2."""

    def __init__(self, workspace: torch.Tensor) -> None:
        assert workspace.dtype == torch.uint8

    def plan(self, indptr, indices, M, N, R, C, num_qo_heads, num_kv_heads, head_dim, *, sm_scale, q_data_type) -> None:
        assert M % R == 0 and N % C == 0 and indptr.dtype == indices.dtype == torch.int32
        assert len(indptr) == M // R + 1 and int(indptr[-1]) == len(indices) and int(indices.max()) < N // C
        self.mask = torch.zeros(M, N, dtype=torch.bool)
        for block in range(M // R):
            for column in indices[int(indptr[block]) : int(indptr[block + 1])].tolist():
                self.mask[block * R : (block + 1) * R, column * C : (column + 1) * C] = True
        self.heads, self.scale, self.sizes = (num_qo_heads, num_kv_heads), sm_scale, (M, N, head_dim)

    def run(self, q, k, v, return_lse: bool):
        assert return_lse and q.shape == (self.sizes[0], self.heads[0], self.sizes[2])
        assert k.shape == v.shape == (self.sizes[1], self.heads[1], self.sizes[2])
        k, v = (x.repeat_interleave(self.heads[0] // self.heads[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
        scores = scores.masked_fill(~self.mask, -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), (scores.logsumexp(-1) / math.log(2)).T


@pytest.mark.parametrize("share", ["query", "key"])
def test_the_executor_equals_the_torch_one(share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashinfer")
    module.BlockSparseAttentionWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    flashinfer_stripes = importlib.import_module(NAME)

    q, k, v = random_qkv(2, 130, 4, 2, 16, torch.float64)
    found = plan(q, k, config=AnchorConfig(theta=1.0, block=8, step=2, share=share, dense="never"))
    with pytest.raises(ValueError, match="float16 or bfloat16 on a GPU"):
        execute(found, q, k, v, kernel="flashinfer")
    monkeypatch.setattr(flashinfer_stripes, "refuses", lambda q, v: None)
    want, want_lse = execute(found, q, k, v, return_lse=True)
    out, lse = execute(found, q, k, v, kernel="flashinfer", return_lse=True)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=0)
    monkeypatch.delitem(sys.modules, NAME)

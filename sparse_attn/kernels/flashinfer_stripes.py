"""Stripes on FlashInfer's block-sparse attention with key blocks of one column; the anchor region as in `TorchKernel`.

FlashInfer takes a block-sparse matrix of R x C blocks as compressed rows: here R = a group's rows and C = 1, one list for all
query heads of a key head, which is a plan with `share="key"`. Each batch entry, key head and full group is one row of that
matrix over the keys of one head. Its log-sum-exp is in base 2. Only `sparse_attn.kernels.choice` imports this module.
"""

from __future__ import annotations

import math

import flashinfer
import torch
from torch import Tensor

from sparse_attn.kernels.blocks import empty
from sparse_attn.kernels.torch_kernel import TorchKernel, heads_of
from sparse_attn.stripes import StripePlan
from tokenring.merge import merge_

WORKSPACE_BYTES = 128 << 20


def refuses(q: Tensor, v: Tensor) -> str | None:
    """Why FlashInfer cannot take the tensors; None if it can."""
    if q.dtype in (torch.float16, torch.bfloat16) and q.is_cuda and q.shape[3] == v.shape[3]:
        return None
    return f"float16 or bfloat16 on a GPU with one head dim, got {q.dtype} on {q.device} with {q.shape[3]} and {v.shape[3]}"


class FlashInferKernel(TorchKernel):
    """One planned block-sparse call a list: lists differ in length and groups in rows, which one matrix cannot say."""

    def __init__(self, name: str, q: Tensor, v: Tensor, scale: float) -> None:
        super().__init__(name, q, v, scale)
        if (reason := refuses(q, v)) is not None:
            raise ValueError(f'flashinfer takes {reason}; use kernel="auto"')
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)

    def stripes_(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: StripePlan) -> None:
        """Every group's columns join (out, lse) of its rows, in place."""
        wrapper = flashinfer.BlockSparseAttentionWrapper(self.workspace)
        # (B, Hkv, Sk, 1, D): the keys of one head as FlashInfer wants them, copied once.
        keys, values = (x.transpose(1, 2).contiguous().unsqueeze(3) for x in (k, v))
        for number, group in enumerate(plan.geometry.groups):
            rows = slice(*group.rows)
            part_out, part_lse = empty(q[:, rows], v.shape[-1], q.dtype)
            for place, columns in enumerate(plan.lists(number)):
                if len(columns):
                    entry, heads, key_head = heads_of(plan, place)
                    queries = q[entry, rows, heads].contiguous()
                    ends = torch.tensor([0, len(columns)], dtype=torch.int32, device=q.device)
                    sizes = group.count, k.shape[1], group.count, 1, queries.shape[1], 1, q.shape[3]
                    wrapper.plan(ends, columns, *sizes, sm_scale=self.blocks.scale, q_data_type=q.dtype)
                    head = keys[entry, key_head], values[entry, key_head]
                    found, found_lse = wrapper.run(queries, *head, return_lse=True)
                    part_out[entry, :, heads], part_lse[entry, heads] = found, found_lse.T * math.log(2)
            merge_(out[:, rows], lse[:, :, rows], part_out, part_lse)

"""torch's flash attention for CPUs, the operator that also returns the log-sum-exp.

`aten::_scaled_dot_product_flash_attention_for_cpu` is private, so this is the only file that names it; the reference kernel
takes what this one refuses, and a test holds the two equal. It takes grouped heads as they are, a causal flag that aligns the
first query with the first key, and an additive mask: `bands.py` makes every band of these. Zero keys would end the process:
`block` never sees them.

16-bit inputs are computed in float32 wherever the operator would only emulate 16-bit products: its float16 backward took ten
times as long as float32's on the processor it was measured on, its bfloat16 backward one and a half to seven times as long
where the processor lacks bfloat16 instructions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenring.kernels import bands
from tokenring.kernels.base import BlockKernel
from tokenring.kernels.delta import out_of

FEW_HEADS = 2
"""Batch entries times heads whose triangles are too little work for a call."""

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class CpuFlashKernel(BlockKernel):
    """Every band on torch's flash operator for CPUs, forward and backward."""

    name = "cpu_flash"

    def refuses(self, q: Tensor, v: Tensor, softcap: float | None) -> str | None:
        if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            return "this torch build lacks the flash operator for CPUs"
        if q.device.type != "cpu" or q.dtype not in _DTYPES:
            return f"it takes float16, bfloat16, float32 and float64 on the CPU, not {q.dtype} on {q.device.type}"
        if q.shape[-1] != v.shape[-1]:
            return f"it needs one head dim for keys and values, not {q.shape[-1]} and {v.shape[-1]}"
        return None if softcap is None else "it has no softcap"

    def block(
        self, q: Tensor, k: Tensor, v: Tensor, lower: int | None, upper: int | None, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(x.transpose(1, 2) for x in (q, k, v)), 0.0, causal, attn_mask=mask, scale=scale
            )
            return out.transpose(1, 2), lse

        dtype, (q, k, v) = q.dtype, _computed(q, k, v)
        out, lse = bands.attend(call, _sizes(q), q, k, v, lower, upper)
        return out.to(dtype), lse

    def block_backward(
        self,
        queries: tuple[Tensor, ...],
        k: Tensor,
        v: Tensor,
        lower: int | None,
        upper: int | None,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        def call(
            queries: bands.Queries, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor]:
            q, do, out, lse = queries
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(x.transpose(1, 2) for x in (do, q, k, v, out)), lse, 0.0, causal, attn_mask=mask, scale=scale
            )
            dq, dk, dv = (x.transpose(1, 2) for x in grads)
            return dq, dk, dv

        q, do, out, k, v = _computed(*queries[:2], out_of(queries), k, v)
        return bands.differentiate(call, _sizes(q), (q, do, out, queries[2]), k, v, lower, upper)


def _computed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that the operator computes them in."""
    dtype = tensors[0].dtype
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not _has_bfloat16()):
        return tuple(x.to(torch.float32) for x in tensors)
    return tensors


def _has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16; older torch does not tell."""
    told = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(told.get("avx512_bf16") or told.get("amx_bf16"))


def _block_rows(width: int) -> int:
    """Measured on one thread: taller blocks multiply faster, and read more keys that the band leaves out."""
    return 64 if width < 1024 else 128 if width < 2048 else 256


def _sizes(q: Tensor) -> bands.Sizes:
    """A causal call of the operator reads whole blocks of 512 keys, so it is cut into squares and triangles where that pays: on one
    thread small triangles took 2% to 19% off its time over 512 to 4,096 rows of four heads or more. Calls that short lose
    more than they save between two threads or with few heads, save where the whole is shorter than two of its blocks.
    """
    if q.element_size() == 2:
        return bands.Sizes(_block_rows)
    if torch.get_num_threads() == 1 and q.shape[0] * q.shape[2] > FEW_HEADS:
        return bands.Sizes(_block_rows, causal=191)
    return bands.Sizes(_block_rows, causal=383 if q.shape[1] < 1024 else None)

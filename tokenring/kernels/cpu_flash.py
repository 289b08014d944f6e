"""torch's flash attention for CPUs, the operator that also returns the log-sum-exp.

`aten::_scaled_dot_product_flash_attention_for_cpu` is private, so this is the only file that names it; the reference kernel is
its fallback, and a test holds the two equal. It takes grouped heads as they are. Its causal flag aligns the first query with
the first key, so a band with `upper > 0` is one full and one causal call. Zero keys would end the process: `block` never
sees them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenring.kernels.base import BlockKernel
from tokenring.kernels.reference import ReferenceKernel
from tokenring.merge import accumulator_dtype, merge_

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class CpuFlashKernel(BlockKernel):
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
        if lower is not None:
            return ReferenceKernel().block(q, k, v, lower, upper, scale, softcap)
        if upper is None or upper == 0:
            return _flash(q, k, v, upper == 0, scale)
        out, lse = _flash(q, k[:, :upper], v[:, :upper], False, scale)
        out = out.to(accumulator_dtype(q.dtype))
        merge_(out, lse, *_flash(q, k[:, upper:], v[:, upper:], True, scale))
        return out.to(q.dtype), lse

    def block_backward(
        self,
        queries: tuple[Tensor, Tensor, Tensor, Tensor],
        k: Tensor,
        v: Tensor,
        lower: int | None,
        upper: int | None,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if lower is not None:
            return ReferenceKernel().block_backward(queries, k, v, lower, upper, scale, softcap)
        if upper is None or upper == 0:
            return _flash_backward(queries, k, v, upper == 0, scale)
        near = _flash_backward(queries, k[:, :upper], v[:, :upper], False, scale)
        far = _flash_backward(queries, k[:, upper:], v[:, upper:], True, scale)
        dk, dv = (torch.cat(parts, dim=1) for parts in zip(near[1:], far[1:]))
        return near[0].to(accumulator_dtype(k.dtype)) + far[0], dk, dv


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, causal, scale=scale
    )
    return out.transpose(1, 2), lse


def _flash_backward(
    queries: tuple[Tensor, Tensor, Tensor, Tensor], k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator wants `out` only for delta = rowsum(do * out), so any tensor with that product serves: do * delta / |do|^2."""
    q, do, lse, delta = queries
    wide = do.to(lse.dtype)
    length = wide.square().sum(-1).clamp_min_(torch.finfo(lse.dtype).tiny)
    stand_in = (wide * (delta.transpose(1, 2) / length).unsqueeze(-1)).to(do.dtype)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x.transpose(1, 2) for x in (do, q, k, v, stand_in)), lse, 0.0, causal, scale=scale
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv

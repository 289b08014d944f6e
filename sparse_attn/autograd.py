"""A result with its backward pass, and what a call hands back: the same on one device and over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_attn.stats import Stats

Gradients = tuple[Tensor, Tensor, Tensor]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Gradients]
"""dq, dk and dv from q, k, v, out, lse and do."""


def differentiable(made: tuple[Tensor, Tensor], backward: Backward, *qkv: Tensor) -> tuple[Tensor, Tensor]:
    """out (B, S, Hq, Dv) in q's dtype and lse, as they were made without gradients, differentiable in q, k and v where asked.

    The columns are constants: `backward` runs under those that were chosen.
    """
    out, lse = made[0].to(qkv[0].dtype), made[1]
    if torch.is_grad_enabled() and any(x.requires_grad for x in qkv):
        return _Made.apply(*qkv, out, lse, backward)
    return out, lse


def answer(out: Tensor, lse: Tensor, stats: Stats, return_lse: bool, return_stats: bool) -> Any:
    """out, or a tuple of out and what else was asked for."""
    found = (out, *((lse,) if return_lse else ()), *((stats,) if return_stats else ()))
    return found if len(found) > 1 else out


class _Made(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, backward: Backward
    ) -> tuple[Tensor, Tensor]:
        out, lse = out.view_as(out), lse.view_as(lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.backward_of_call = backward
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(do.device.type, enabled=False):
            return *ctx.backward_of_call(*ctx.saved_tensors, do), None, None, None

"""The online-softmax merge, once.

Two partial attentions over disjoint keys, each with its log-sum-exp, make one:

    lse = log(exp(lse_a) + exp(lse_b)),   out = out_a + sigmoid(lse_b - lse_a) * (out_b - out_a)

The sigmoid form never overflows. An empty partial has lse = -inf and out = 0; two empty ones stay empty.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_CONVERTED = 2**19
"""Numbers of a 16-bit partial that are converted at a time."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Partials are merged in float32, or in float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a partial into (out, lse), in place.

    Args:
        out, part_out: (B, S, H, D); `out` in the accumulator dtype.
        lse, part_lse: (B, H, S), natural logarithm.

    On CUDA devices one Triton kernel does it where Triton is installed.

    >>> out, lse = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1)
    >>> merge_(out, lse, torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1))
    >>> out.flatten(), lse.flatten()
    (tensor([0.5000, 0.5000]), tensor([0.6931]))
    """
    fused = _fused() if out.is_cuda and out.stride(3) == 1 else None
    if fused is not None:
        fused(out, lse, part_out, part_lse)
        return
    weight = torch.sigmoid(part_lse - lse).nan_to_num_(0.0)
    # Rows of `out` meet their weights in order, which takes a third off the pass over `out`.
    weight = weight.transpose(1, 2).unsqueeze(-1).to(out.dtype).contiguous()
    if part_out.dtype == out.dtype:
        out.lerp_(part_out, weight)
    else:
        # In pieces: a converted copy of all of it would be fresh memory, which costs more than the merge.
        step = max(1, _CONVERTED * out.shape[1] // max(1, out.numel()))
        for first in range(0, out.shape[1], step):
            rows = slice(first, first + step)
            out[:, rows].lerp_(part_out[:, rows].to(out.dtype), weight[:, rows])
    torch.logaddexp(lse, part_lse, out=lse)


@cache
def _fused() -> Callable[[Tensor, Tensor, Tensor, Tensor], None] | None:
    try:
        from tokenring.kernels.triton_merge import merge_ as fused
    except ImportError:
        return None
    return fused


def merge_sinks_(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """One virtual key of logit `sinks[h]` and value 0 joins every row that attends to something.

    Args:
        out: (B, S, H, D). lse: (B, H, S). sinks: (H,).
    """
    logit = sinks.to(lse.dtype)[None, :, None].expand_as(lse)
    empty = torch.isneginf(lse)
    total = torch.logaddexp(lse, logit)
    keep = torch.exp(lse - total).masked_fill_(empty, 1.0).transpose(1, 2).unsqueeze(-1)
    out.mul_(keep.to(out.dtype))
    lse.copy_(torch.where(empty, lse, total))

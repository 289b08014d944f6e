"""The online-softmax merge, once.

Two partial attentions over disjoint keys, each with its log-sum-exp, make one:

    lse = log(exp(lse_a) + exp(lse_b)),   out = out_a + sigmoid(lse_b - lse_a) * (out_b - out_a)

The sigmoid form never overflows. An empty partial has lse = -inf and out = 0; two empty ones stay empty.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Partials are merged in float32, or in float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge a partial into (out, lse), in place.

    Args:
        out, part_out: (B, S, H, D); `out` in the accumulator dtype.
        lse, part_lse: (B, H, S), natural logarithm.
    """
    weight = torch.sigmoid(part_lse - lse).nan_to_num_(0.0)
    out.lerp_(part_out.to(out.dtype), weight.transpose(1, 2).unsqueeze(-1).to(out.dtype))
    torch.logaddexp(lse, part_lse, out=lse)


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

"""Attention under a plan in float64, written out with a mask: what every executor must equal. Quadratic memory, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.stripes import StripePlan


def reference_attention(
    plan: StripePlan, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """out (B, Sq, Hq, Dv) and lse (B, Hq, Sq) in float64 over exactly the pairs of `plan.dense_mask`.

    out = softmax(scale * q k^T + log mask) v
    """
    plan.check(q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    each = q.shape[2] // k.shape[2]
    outs, lses = [], []
    for entry in range(q.shape[0]):
        for head in range(q.shape[2]):
            rows, keys, values = (
                x.double() for x in (q[entry, :, head], k[entry, :, head // each], v[entry, :, head // each])
            )
            scores = (rows @ keys.T * scale).masked_fill(~plan.dense_mask(entry, head).to(q.device), -torch.inf)
            lse = torch.logsumexp(scores, 1)
            outs.append(torch.exp(scores - lse[:, None]) @ values)
            lses.append(lse)
    shape = q.shape[0], q.shape[2]
    return torch.stack(outs).unflatten(0, shape).transpose(1, 2), torch.stack(lses).unflatten(0, shape)

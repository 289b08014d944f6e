"""Plain attention in torch operations: any device, dtype, band, head dims; the oracle beside every faster kernel.

    out = softmax(scale * q k^T) v,   lse = log sum exp(scale * q k^T)
    p = exp(scale * q k^T - lse),   dv = p^T do,   ds = p * (do v^T - delta),   dq = scale ds k,   dk = scale ds^T q

Scores are computed in float32 (float64 for float64), a block of query rows at a time, so memory stays linear in length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenring.kernels.base import BlockKernel
from tokenring.merge import accumulator_dtype

BLOCK_ROWS = 256


class ReferenceKernel(BlockKernel):
    name = "reference"

    def refuses(self, q: Tensor, v: Tensor, softcap: float | None) -> str | None:
        return None

    def block(
        self, q: Tensor, k: Tensor, v: Tensor, lower: int | None, upper: int | None, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulator_dtype(q.dtype)
        key_heads = k.to(dtype).permute(0, 2, 3, 1).unsqueeze(2)
        value_heads = v.to(dtype).transpose(1, 2).unsqueeze(2)
        outs, lses = [], []
        for first in range(0, q.shape[1], BLOCK_ROWS):
            rows = q[:, first : first + BLOCK_ROWS].to(dtype)
            grouped = rows.transpose(1, 2).unflatten(1, (k.shape[2], -1))
            seen = _seen(first, rows.shape[1], k.shape[1], lower, upper)
            scores = (grouped * scale) @ key_heads[..., seen]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            blocked = _outside(first - seen.start, rows.shape[1], scores.shape[-1], lower, upper, q.device)
            if blocked is not None:
                scores = scores.masked_fill(blocked, -torch.inf)
            lse = torch.logsumexp(scores, dim=-1)
            out = torch.exp(scores - lse.unsqueeze(-1)) @ value_heads[..., seen, :]
            outs.append(out.flatten(1, 2).transpose(1, 2))
            lses.append(lse.flatten(1, 2))
        return torch.cat(outs, dim=1).to(q.dtype), torch.cat(lses, dim=2)

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
        dtype = accumulator_dtype(k.dtype)
        heads = k.shape[2]
        keys, values = (x.to(dtype).transpose(1, 2).unsqueeze(2) for x in (k, v))
        dq = torch.empty_like(queries[0], dtype=dtype)
        dk, dv = (torch.zeros(x.shape[0], heads, *x.shape[1::2], dtype=dtype, device=x.device) for x in (k, v))
        for first in range(0, dq.shape[1], BLOCK_ROWS):
            last = min(first + BLOCK_ROWS, dq.shape[1])
            q, do = (x[:, first:last].to(dtype).transpose(1, 2).unflatten(1, (heads, -1)) for x in queries[:2])
            lse, delta = (x[:, :, first:last].unflatten(1, (heads, -1)).unsqueeze(-1) for x in queries[2:4])
            seen = _seen(first, last - first, k.shape[1], lower, upper)
            scores = (q * scale) @ keys[..., seen, :].transpose(-1, -2)
            bent = None if softcap is None else torch.tanh(scores / softcap)
            weights = torch.exp((scores if bent is None else softcap * bent) - lse)
            blocked = _outside(first - seen.start, last - first, scores.shape[-1], lower, upper, k.device)
            if blocked is not None:
                weights = weights.masked_fill(blocked, 0.0)
            slopes = weights * (do @ values[..., seen, :].transpose(-1, -2) - delta) * scale
            if bent is not None:
                slopes = slopes * (1 - bent * bent)
            dq[:, first:last] = (slopes @ keys[..., seen, :]).flatten(1, 2).transpose(1, 2)
            dk[:, :, seen] += (slopes.transpose(-1, -2) @ q).sum(2)
            dv[:, :, seen] += (weights.transpose(-1, -2) @ do).sum(2)
        return dq, dk.transpose(1, 2), dv.transpose(1, 2)


def _seen(first: int, rows: int, keys: int, lower: int | None, upper: int | None) -> slice:
    """The keys that some row of a block may see: a window over a long sequence costs what the window holds."""
    start = 0 if lower is None else max(0, first + lower)
    return slice(start, keys if upper is None else min(keys, first + rows + upper))


def _outside(
    first: int, rows: int, keys: int, lower: int | None, upper: int | None, device: torch.device
) -> Tensor | None:
    """True where a pair is outside the band; None where no pair is."""
    if lower is None and upper is None:
        return None
    difference = torch.arange(keys, device=device)[None, :] - torch.arange(first, first + rows, device=device)[:, None]
    outside = torch.zeros_like(difference, dtype=torch.bool)
    if lower is not None:
        outside |= difference < lower
    if upper is not None:
        outside |= difference > upper
    return outside

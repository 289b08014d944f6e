"""Rectangles of attention on tokenring's block kernels, with the traps of the operators kept out.

No keys: an empty partial (zeros, lse = -inf), and the operator never sees them: torch's flash operator for CPUs would end the
process. A row whose keys are all masked would give lse 0 there: no rectangle here has such a row. Two head dims: the smaller
is padded with zeros, which changes no score and adds columns that are cut off again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenring.kernels import backward_kernel, choose
from tokenring.kernels.base import BlockKernel
from tokenring.merge import accumulator_dtype


@dataclass(frozen=True)
class Blocks:
    """A block kernel and what every rectangle of one call shares."""

    kernel: BlockKernel
    scale: float
    v_dim: int

    @classmethod
    def of(cls, name: str, q: Tensor, v: Tensor, scale: float) -> Blocks:
        """`name` as in `tokenring.attention(kernel=...)`."""
        if q.shape[-1] != v.shape[-1]:
            return cls(choose(name, *_even(q[:, :1], v[:, :1]), None), scale, v.shape[-1])
        return cls(choose(name, q, v, None), scale, v.shape[-1])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> tuple[Tensor, Tensor]:
        """One rectangle, or a causal square whose first row meets its first key.

        Args:
            q: (B, Sq, Hq, D). k: (B, Sk, Hkv, D). v: (B, Sk, Hkv, Dv).

        Returns:
            out (B, Sq, Hq, Dv) in q's dtype, lse (B, Hq, Sq).
        """
        if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[0] == 0:
            return empty(q, self.v_dim, q.dtype)
        if self.v_dim != q.shape[3]:
            q, k, v = _even(q, k, v)
        out, lse = self.kernel.block(q, k, v, None, 0 if causal else None, self.scale, None)
        return out if out.shape[3] == self.v_dim else out[..., : self.v_dim], lse

    def gradients(
        self, queries: tuple[Tensor, Tensor, Tensor, Tensor], k: Tensor, v: Tensor, *, causal: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The rectangle's share of dq, dk and dv; queries are q, do, and lse, delta of the whole rows."""
        q, do, lse, delta = queries
        if k.shape[1] == 0 or q.shape[1] == 0:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dims = q.shape[-1], self.v_dim
        q, k, do, v = _even(q, k, do, v)
        kernel = backward_kernel(self.kernel, q, v, None)
        dq, dk, dv = kernel.block_backward((q, do, lse, delta), k, v, None, 0 if causal else None, self.scale, None)
        return dq[..., : dims[0]], dk[..., : dims[0]], dv[..., : dims[1]]


def empty(q: Tensor, v_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out and lse of rows that have seen no key yet."""
    wide = accumulator_dtype(q.dtype)
    batch, rows, heads = q.shape[:3]
    return q.new_zeros(batch, rows, heads, v_dim, dtype=dtype), q.new_full((batch, heads, rows), -torch.inf, dtype=wide)


def _even(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All with the widest head dim among them."""
    widest, least = max(x.shape[-1] for x in tensors), min(x.shape[-1] for x in tensors)
    if widest == least:
        return tensors
    return tuple(x if x.shape[-1] == widest else pad(x, (0, widest - x.shape[-1])) for x in tensors)

"""Grouped matrix product: consecutive groups of rows, each times its own matrix."""

from __future__ import annotations

import torch
from torch import Tensor

BACKENDS = ("auto", "grouped", "loop")


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, *, backend: str = "auto") -> Tensor:
    """Rows of group g times weight[g].

    Args:
        x: (M, K), group after group.
        weight: (G, K, N), in x's dtype.
        counts: (G,) int64 rows of each group; adds up to M; 0 is fine.
        backend: "grouped" is torch's own grouped product (float32, bfloat16 and float16 on CPUs, bfloat16 on GPUs; rows of
            whole 16 bytes), "loop" one product a group, "auto" the first where it can.

    >>> x, w = torch.ones(3, 2), torch.stack([torch.eye(2), 5 * torch.eye(2)])
    >>> grouped_matmul(x, w, torch.tensor([1, 2])).tolist()
    [[1.0, 1.0], [5.0, 5.0], [5.0, 5.0]]
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; give one of {', '.join(BACKENDS)}")
    if weight.dtype != x.dtype:
        raise ValueError(f"rows are {x.dtype} and weights {weight.dtype}; give one dtype")
    reason = _why_not(x, weight)
    if backend == "grouped" and reason is not None:
        raise ValueError(f"backend 'grouped' cannot: {reason}; give 'auto' or 'loop'")
    if backend == "loop" or reason is not None or not x.shape[0]:
        parts = x.split(counts.tolist())
        return torch.cat([part @ matrix for part, matrix in zip(parts, weight)])
    ends = counts.cumsum(0).to(device=x.device, dtype=torch.int32)
    return _DenseGradient.apply(torch._grouped_mm(x, weight, offs=ends))


def _why_not(x: Tensor, weight: Tensor) -> str | None:
    """Why torch's grouped product refuses, or None."""
    if not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has none"
    known = (torch.bfloat16,) if x.is_cuda else (torch.float32, torch.bfloat16, torch.float16)
    if x.dtype not in known:
        return f"it takes {', '.join(map(str, known))} on {x.device.type}, got {x.dtype}"
    if any(size * x.element_size() % 16 for size in weight.shape[1:]):
        return f"rows of {weight.shape[1]} and {weight.shape[2]} elements are no whole 16 bytes"
    return None


class _DenseGradient(torch.autograd.Function):
    """Identity; torch's grouped product refuses expanded gradients, such as those of a plain sum."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.contiguous()

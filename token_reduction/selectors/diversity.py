"""Greedy diversity in O(n D) memory: max-sum from a pivot, and the most probable set of a DPP (max-min: `farthest`).

    max-sum   next = arg-min_v sum_{c kept} cos(v, c)
    DPP       next = arg-max_v det L[kept + v] / det L[kept]      L_ij = r_i r_j cos(i, j)

The DPP's ratio is the squared residual d_v of v after projection on the kept, updated by one row of a Cholesky factor each step
(Chen, Zhang, Zhou, "Fast greedy MAP inference for determinantal point process", NeurIPS 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_RANK = 1e-10
_AHEAD = 32
_SMALL = 1024  # rows of a set whose kernel may be held

Column = Callable[[Tensor, Tensor], Tensor]


def max_sum(q: Tensor, count: int, pivot: Tensor) -> Tensor:
    """Order of choice (B, count) over exact unit rows q (B, n, D), from `pivot` (B,); ties go to the lowest index."""
    batch, n, _ = q.shape
    total, every = q.new_zeros(batch, n), torch.arange(batch, device=q.device)
    alike = q @ q.mT if n <= _SMALL else None
    order = [pivot]
    for _ in range(count - 1):
        last = order[-1]
        total += (q @ q[every, last, :, None])[..., 0] if alike is None else alike[every, last]
        total[every, last] = math.inf
        order.append(total.argmin(1))
    return torch.stack(order, 1)


def dpp(q: Tensor, count: int, quality: Tensor, block: int | None = None) -> Tensor:
    """Order of choice (B, count) of greedy MAP over L = diag(r) q q^T diag(r), q (B, n, D), r (B, n); ties go to the lowest index.

    A kernel of rank D has no more than D rows of positive determinant; after that, or after `block` choices, a new set is
    begun among the rows that are left. So at most min(D, block) rows of the factor are held: O(n min(D, block)) memory.
    """
    # Rounded unit rows are 1 long up to 1e-8, which must not break ties between tokens that are equally good alone.
    alone, block = q.any(-1).to(q) * quality**2, block or q.shape[-1]
    together, done = range(len(q)), torch.zeros(len(q), count, dtype=torch.int64, device=q.device)
    if len(q) > 1 and count <= block:
        order, lengths = _set(_held(q, quality), alone, torch.zeros_like(alone, dtype=torch.bool), count)
        done = order
        together = [unit for unit, length in enumerate(lengths) if length < count]
    for unit in together:
        part = slice(unit, unit + 1)
        done[unit] = dpp_of(_Columns(q[unit], quality[unit]), alone[part], count, block)[0]
    return done


def _held(q: Tensor, quality: Tensor) -> Column:
    """Columns of kernels that are held."""
    kernel, every = q @ q.mT, torch.arange(len(q), device=q.device)
    return lambda best, left: kernel[every, best] * quality * quality[every, best, None]


class _Columns:
    """Columns of one kernel, made for the best candidates at once: one matrix product instead of many passes over q."""

    def __init__(self, q: Tensor, quality: Tensor) -> None:
        self.q, self.quality = q, quality
        self.made: dict[int, Tensor] = {}

    def __call__(self, best: Tensor, left: Tensor) -> Tensor:
        i = int(best)
        if i not in self.made:
            ahead = left[0].topk(min(_AHEAD, left.shape[1])).indices.tolist()
            js = torch.tensor([i, *(j for j in ahead if j != i)], device=self.q.device)
            self.made = dict(zip(js.tolist(), self.q[js] @ self.q.mT))
        return (self.made[i] * self.quality * self.quality[i])[None]


def dpp_of(column: Column, diagonal: Tensor, count: int, block: int) -> Tensor:
    """`dpp` of one kernel of any kind, (1, count), given by `column(best, left)`: row `best` (1,) of it, where `left` (1, n) is
    what every candidate is worth now; and its diagonal (1, n)."""
    order: list[Tensor] = []
    taken = torch.zeros_like(diagonal, dtype=torch.bool)
    while (left := count - sum(part.shape[1] for part in order)) > 0:
        fresh, (length,) = _set(column, diagonal, taken, min(block, left))
        order.append(fresh[:, :length])
        taken.scatter_(1, order[-1], True)
    return torch.cat(order, 1)


def _set(column: Column, diagonal: Tensor, taken: Tensor, count: int) -> tuple[Tensor, Sequence[int]]:
    """Up to `count` choices (B, count) in kernels of diagonal (B, n), and how many of them are of positive determinant."""
    batch, n = diagonal.shape
    left, floor = diagonal.masked_fill(taken, -math.inf), _RANK * diagonal.amax(1, keepdim=True)
    factor, order, values, least = diagonal.new_empty((batch, count, n)), [], [], floor.clamp_min(1e-300)
    for step in range(count):
        best = left.argmax(1, keepdim=True)
        value = left.gather(1, best)
        if batch == 1 and step and bool(value <= floor):
            return torch.cat(order, 1), [step]
        row = column(best[:, 0], left) - _known(factor, step, best)
        row /= torch.maximum(value, least).sqrt()
        factor[:, step] = row
        left.sub_(row * row).scatter_(1, best, -math.inf)
        order.append(best)
        values.append(value)
    # Sets that are made together go on behind their end, which costs nothing, and are cut there.
    ended = torch.cat(values, 1) <= floor
    ended[:, 0] = False
    return torch.cat(order, 1), torch.where(ended.any(1), ended.int().argmax(1), count).tolist()


def _known(factor: Tensor, step: int, best: Tensor) -> Tensor:
    """(B, n) what the rows chosen so far say of the chosen columns `best` (B, 1).

    A sum over rows adds every column in the same order, so equal rows keep equal residuals; a matrix product may not. In blocks
    of columns that stay in a cache: memory is what bounds it.
    """
    weight = factor[:, :step].gather(2, best[:, None].expand(-1, step, -1))
    width = max(64, 2**17 // max(1, step * len(factor)) // 64 * 64)
    parts = [(part * weight).sum(1) for part in factor[:, :step].split(width, 2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

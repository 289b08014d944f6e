"""Phase 3 on plain matrix products: a list's columns join the state that phase 1 left, a tile at a time in a core's cache.

One number a row, b, stands in for the running maximum, so no tile looks for its own and nothing is scaled again:

    P = exp(scale q k^T - b),   w = exp(lse - b),   l = w + sum P,   out' = (w out + P v) / l,   lse' = b + log l

(arXiv 2505.23520, section 3.4, resumed from m = b, l = w, acc = w out.) b is 0 where the rows' log-sum-exps are moderate, which
saves a pass over the scores, and lse elsewhere. No pass looks for a maximum, no partial is merged, and no call brings fresh
memory. Columns that outweigh a row's anchor region by more than the dtype holds leave sums that are not finite: the block kernel
then does that list.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_attn.kernels.gathered import Rows
from sparse_attn.kernels.products import LOG2_E, MODERATE

TILE_BYTES = 1 << 20
"""Scores of a tile and thread: as much as a second-level cache of 1 MiB; narrower tiles multiply slower than they save."""
TILE_ROWS = 512
"""Most rows of a tile and thread."""
LEAST_ROWS = 32
"""Rows of a list below which the operator's one call costs less than a tile's ten."""


class Resumed:
    """What the lists of one call share: fresh memory costs page faults."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        self.q, self.keys, self.values, self.scale = q, Rows(k), Rows(v), scale
        self.threads = torch.get_num_threads()
        self.memory = [q.new_empty(0), q.new_empty(0)]

    def join_(
        self, out: Tensor, lse: Tensor, entry: int, rows: slice, heads: slice, key_head: int, columns: Tensor
    ) -> bool:
        """Columns of a key head join out and lse of some rows of query heads; False where they must be joined otherwise."""
        mine, state = self.q[entry, rows, heads], (out[entry, rows, heads], lse[entry, heads, rows].T)
        count = mine.shape[0] * mine.shape[1]
        if count < LEAST_ROWS:
            return False
        split = self.threads if count % self.threads == 0 else 1
        queries = mine.reshape(split, count // split, -1) * (self.scale * LOG2_E)
        before = state[1].reshape(split, -1, 1) * LOG2_E
        base = None if float(before.abs().amax()) <= MODERATE else before
        total, sums = self._tiles(queries, base, entry, key_head, columns)
        weight = before.exp2_() if base is None else torch.ones_like(before)
        sums += weight
        if not math.isfinite(float(total.sum() + sums.sum())):
            return False
        shape = state[1].shape
        state[0].mul_((weight / sums).view(*shape, 1)).addcdiv_(total.view(state[0].shape), sums.view(*shape, 1))
        logs = sums.log2_() if base is None else sums.log2_().add_(base)
        torch.div(logs.view(shape), LOG2_E, out=state[1])
        return True

    def _tiles(
        self, q: Tensor, base: Tensor | None, entry: int, key_head: int, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """sum of P v and sum of P, for scaled rows (split, n, D) and their b (split, n, 1) in base 2; None for 0."""
        split, count = q.shape[:2]
        tall = -(-count // -(-count // TILE_ROWS))
        wide = TILE_BYTES // (q.element_size() * tall)
        total = self._held(0, split, count, self.values.x.shape[3])
        sums = q.new_zeros(split, count, 1)
        keys, values = (x.gathered(entry, key_head, columns).expand(split, -1, -1) for x in (self.keys, self.values))
        for first in range(0, len(columns), wide):
            some = slice(first, first + wide)
            for row in range(0, count, tall):
                here = slice(row, row + tall)
                scores = self._held(1, split, min(tall, count - row), min(wide, len(columns) - first))
                if base is None:
                    torch.bmm(q[:, here], keys[:, some].mT, out=scores)
                else:
                    torch.sub(torch.bmm(q[:, here], keys[:, some].mT, out=scores), base[:, here], out=scores)
                sums[:, here] += scores.exp2_().sum(-1, keepdim=True)
                total[:, here].baddbmm_(scores, values[:, some], beta=min(first, 1))
        return total, sums

    def _held(self, number: int, *shape: int) -> Tensor:
        size = math.prod(shape)
        if self.memory[number].numel() < size:
            self.memory[number] = self.q.new_empty(size)
        return self.memory[number][:size].view(shape)

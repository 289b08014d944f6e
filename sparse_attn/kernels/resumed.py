"""Phase 3 on plain matrix products: a list's columns join the state that phase 1 left, a tile at a time in a core's cache.

The state's log-sum-exp stands in for the running maximum, so no tile looks for its own and nothing is scaled again:

    P = exp(scale q k^T - lse),   l = 1 + sum P,   out' = (out + P v) / l,   lse' = lse + log l

(arXiv 2505.23520, section 3.4, resumed from m = lse, l = 1, acc = out.) No pass looks for a maximum, no partial is merged, and no
call brings fresh memory: 3 to 5% over torch's flash operator at 512 rows, 15% at 64. Columns that outweigh a row's anchor region by more
than the dtype holds leave sums that are not finite: the block kernel then does that list.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_attn.kernels.gathered import Rows

TILE_BYTES = 1 << 20
"""Scores of a tile and thread: as much as a second-level cache of 1 MiB; narrower tiles multiply slower than they save."""
TILE_ROWS = 512
"""Most rows of a tile and thread."""
LEAST_ROWS = 32
"""Rows of a list below which the operator's one call costs less than a tile's ten."""
LOG2_E = math.log2(math.e)


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
        queries = mine.reshape(split, count // split, -1)
        base = state[1].reshape(split, -1, 1) * -LOG2_E
        total, sums = self._tiles(queries, base, entry, key_head, columns)
        if not math.isfinite(float(total.sum() + sums.sum())):
            return False
        sums = sums.view(state[1].shape)
        weight = (sums + 1).reciprocal_().unsqueeze(2)
        state[0].add_(total.view(state[0].shape)).mul_(weight)
        state[1].add_(sums.log1p_())
        return True

    def _tiles(self, q: Tensor, base: Tensor, entry: int, key_head: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """sum of P v and sum of P, for rows (split, n, D) whose -lse in base 2 is `base`."""
        split, count = q.shape[:2]
        tall = -(-count // -(-count // TILE_ROWS))
        wide = TILE_BYTES // (q.element_size() * tall)
        total = self._held(0, split, count, self.values.x.shape[3])
        sums = torch.zeros_like(base)
        keys, values = (x.gathered(entry, key_head, columns).expand(split, -1, -1) for x in (self.keys, self.values))
        for first in range(0, len(columns), wide):
            some = slice(first, first + wide)
            for row in range(0, count, tall):
                here = slice(row, row + tall)
                scores = self._held(1, split, min(tall, count - row), min(wide, len(columns) - first))
                torch.baddbmm(base[:, here], q[:, here], keys[:, some].mT, alpha=self.scale * LOG2_E, out=scores)
                sums[:, here] += scores.exp2_().sum(-1, keepdim=True)
                total[:, here].baddbmm_(scores, values[:, some], beta=min(first, 1))
        return total, sums

    def _held(self, number: int, *shape: int) -> Tensor:
        size = math.prod(shape)
        if self.memory[number].numel() < size:
            self.memory[number] = self.q.new_empty(size)
        return self.memory[number][:size].view(shape)

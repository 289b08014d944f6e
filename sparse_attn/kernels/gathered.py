"""Chosen rows of keys or values, side by side."""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
    """Chosen rows, copied into one memory that the next list takes over: fresh memory costs page faults."""

    def __init__(self, x: Tensor) -> None:
        """x: (B, S, H, D)."""
        self.x, self.memory = x, x.new_empty(0, x.shape[3])

    def gathered(self, entry: int, head: int, columns: Tensor) -> Tensor:
        """(n, D), valid until the next call; a run of neighbours is a view."""
        rows, first, last = self.x[entry, :, head], int(columns[0]), int(columns[-1])
        if last - first + 1 == len(columns):
            return rows[first : last + 1]
        if len(self.memory) < len(columns):
            self.memory = self.x.new_empty(2 * len(columns), self.x.shape[3])
        return torch.index_select(rows, 0, columns, out=self.memory[: len(columns)])

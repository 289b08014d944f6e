"""What phase 1 leaves for the others."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tokenring.merge import accumulator_dtype


class AnchorState(NamedTuple):
    """Online softmax of every row over its anchor region; the paper's m, l and acc are top, exp(lse - top) and out * l."""

    out: Tensor
    """(B, S, Hq, Dv), float32 (float64 for float64)."""
    lse: Tensor
    """(B, Hq, S), of out's dtype, natural log."""
    top: Tensor | None
    """(B, Hq, S), the largest score of each row; None where the kernel keeps it to itself."""

    @classmethod
    def unfilled(cls, q: Tensor, v_dim: int) -> AnchorState:
        """Memory for all three; groups cover every row of q."""
        batch, rows, heads = q.shape[:3]
        wide = accumulator_dtype(q.dtype)
        lse, top = q.new_empty(2, batch, heads, rows, dtype=wide)
        return cls(q.new_empty(batch, rows, heads, v_dim, dtype=wide), lse, top)

"""The global shape of one attention call, and what a row of it weighs on the wire."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Global shape of one attention call: lengths over all ranks, heads, head dims, dtype of q, k, v and out."""

    batch: int
    q_length: int
    kv_length: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        v_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
        if min(self.batch, self.q_heads, self.kv_heads, self.head_dim, v_dim) < 1 or self.q_heads % self.kv_heads:
            raise ValueError(
                f"AttentionShape got batch={self.batch}, q_heads={self.q_heads}, kv_heads={self.kv_heads}, "
                f"head_dim={self.head_dim}, v_head_dim={self.v_head_dim}; "
                "all must be 1 or more and q_heads a multiple of kv_heads"
            )
        if min(self.q_length, self.kv_length) < 0 or not self.dtype.is_floating_point:
            raise ValueError(
                f"AttentionShape got q_length={self.q_length}, kv_length={self.kv_length}, dtype={self.dtype}; "
                "lengths must be 0 or more, the dtype a floating one"
            )

    def head_bytes(self, what: str, partial: torch.dtype | None = None) -> int:
        """Bytes of one head of one row, of all batch entries, on the wire, for each `what` of a Slot.

        q, k, v, out and do go in the input's dtype, lse and delta in float32 (float64 for float64), partial
        gradients in `partial` (the input's dtype where not given).
        """
        size, wide = self.dtype.itemsize, 8 if self.dtype == torch.float64 else 4
        part = size if partial is None else partial.itemsize
        v_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
        both = self.head_dim + v_dim
        one_entry = {
            "q": self.head_dim * size,
            "kv": both * size,
            "out": v_dim * size + wide,
            "qd": both * size + 2 * wide,
            "dq": self.head_dim * part,
            "dkv": both * part,
        }
        return self.batch * one_entry[what]

"""What the calls refuse: what was given, what is allowed, how to mend it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokenring import Mask


def check(q: Tensor, k: Tensor, v: Tensor, scale: float | None, spread: bool = False) -> None:
    """(B, S, H, D) tensors of one floating dtype and device that agree; a scale that is a number.

    spread: they are one rank's rows, of which there may be more queries than keys.
    """
    wrong = _wrong_shapes(tuple(q.shape), tuple(k.shape), tuple(v.shape), spread)
    if wrong is not None:
        raise ValueError(f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; {wrong}")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device and q.is_floating_point()):
        given = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"got {given}; give one floating dtype on one device")
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale is {scale}; it must be above 0 and finite, or None for 1 / sqrt(head dim)")


def _wrong_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], spread: bool) -> str | None:
    if not len(q) == len(k) == len(v) == 4:
        return "each must be (batch, rows, heads, head dim)"
    if k[:3] != v[:3] or q[0] != k[0] or q[3] != k[3]:
        return "k and v must be alike in batch, rows and heads, q and k in batch and head dim"
    if k[2] == 0 or q[2] % k[2] or q[2] == 0:
        return "query heads must be a multiple of key heads, and one or more"
    if q[1] > k[1] and not spread:
        return "queries are the last rows of the keys' sequence, so give at least as many keys"
    return None


def packed(mask: Any, cu_seqlens: Any, kv_cu_seqlens: Any) -> tuple[Any, Any]:
    """cu_seqlens of queries and keys, from themselves or from a causal mask of documents."""
    if isinstance(mask, str) and mask == "causal":
        return cu_seqlens, kv_cu_seqlens
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask is {mask if isinstance(mask, str) else type(mask).__name__!r}; stripes are chosen under causal attention: "
            'give "causal" or a causal tokenring.Mask of documents. Padding on the right needs no mask'
        )
    if mask == Mask.causal():
        return cu_seqlens, kv_cu_seqlens
    cells = mask.cells
    q_cuts, k_cuts = ([0, *(getattr(c, f"{side}_stop") for c in cells)] for side in "qk")
    starts = [(c.q_start, c.k_start) for c in cells] == list(zip(q_cuts, k_cuts))[:-1]
    if not starts or any(c.lower is not None or c.batch or c.upper != c.k_stop - c.q_stop for c in cells):
        raise ValueError(
            "mask is neither causal nor causal documents one after the other; windows, spans and lengths are not honoured "
            "here: use tokenring.attention for them"
        )
    if cu_seqlens is not None or kv_cu_seqlens is not None:
        raise ValueError("got a mask of documents and cu_seqlens; give one of them")
    return q_cuts, k_cuts


def kept_rows(keep: Any, k: Tensor) -> Tensor | None:
    """Ascending int64 rows of k beside it, each once."""
    if keep is None:
        return None
    rows = torch.as_tensor(keep, device=k.device)
    if rows.dim() != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(f"keep has shape {tuple(rows.shape)} and dtype {rows.dtype}; give a list of row numbers of k")
    rows = rows.long().unique()
    if len(rows) and not (int(rows[0]) >= 0 and int(rows[-1]) < k.shape[1]):
        raise ValueError(f"keep has rows {int(rows[0])} to {int(rows[-1])}; k has rows 0 to {k.shape[1] - 1}")
    return rows if len(rows) else None

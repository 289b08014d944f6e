"""What the calls refuse: what was given, what is allowed, how to mend it."""

from __future__ import annotations

import math
from operator import index
from typing import Any

import torch
from torch import Tensor

from sparse_attn.config import AnchorConfig
from tokenring import Mask

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEFAULT = AnchorConfig()


def check(q: Tensor, k: Tensor, v: Tensor, scale: float | None, spread: bool = False) -> None:
    """(B, S, H, D) tensors of one floating dtype and device that agree; a scale that is a number.

    spread: they are one rank's rows, of which there may be more queries than keys.
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        raise ValueError(f"got {', '.join(type(x).__name__ for x in (q, k, v))} as q, k, v; give torch tensors")
    wrong = _wrong_shapes(tuple(q.shape), tuple(k.shape), tuple(v.shape), spread)
    if wrong is not None:
        raise ValueError(f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; {wrong}")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device and q.dtype in DTYPES):
        given = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"got {given}; give one of float16, bfloat16, float32, float64 for all, on one device")
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale is {scale}; it must be above 0 and finite, or None for 1 / sqrt(head dim)")


def _wrong_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], spread: bool) -> str | None:
    if not len(q) == len(k) == len(v) == 4:
        return "each must be (batch, rows, heads, head dim)"
    if k[:3] != v[:3] or q[0] != k[0] or q[3] != k[3]:
        return "k and v must be alike in batch, rows and heads, q and k in batch and head dim"
    if q[3] == 0:
        return "the head dim must be 1 or more"
    if k[2] == 0 or q[2] % k[2] or q[2] == 0:
        return "query heads must be a multiple of key heads, and one or more"
    if q[1] > k[1] and not spread:
        return "queries are the last rows of the keys' sequence, so give at least as many keys"
    return None


def configuration(config: Any) -> AnchorConfig:
    """The configuration of a call: the default where none is given."""
    if config is None:
        return DEFAULT
    if not isinstance(config, AnchorConfig):
        raise ValueError(
            f"config is {config if isinstance(config, type) else type(config).__name__!r}; give an AnchorConfig, which is one "
            "layer's (TunedConfig.layer(number) of tuned ones)"
        )
    return config


Cuts = tuple[int, ...] | None


def packed(mask: Any, cu_seqlens: Any, kv_cu_seqlens: Any) -> tuple[Cuts, Cuts]:
    """cu_seqlens of queries and keys, from themselves or from a causal mask of documents."""
    given = whole_numbers("cu_seqlens", cu_seqlens), whole_numbers("kv_cu_seqlens", kv_cu_seqlens)
    if isinstance(mask, str) and mask == "causal":
        return given
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask is {mask if isinstance(mask, str) else type(mask).__name__!r}; stripes are chosen under causal attention: "
            'give "causal" or a causal tokenring.Mask of documents. Padding on the right needs no mask'
        )
    if mask == Mask.causal():
        return given
    cuts = _documents(mask)
    if cuts is None:
        raise ValueError(
            "mask is neither causal nor causal documents one after the other; windows, spans and lengths are not honoured "
            "here: use tokenring.attention for them"
        )
    if given != (None, None):
        raise ValueError("got a mask of documents and cu_seqlens; give one of them")
    return cuts


def _documents(mask: Mask) -> tuple[Cuts, Cuts] | None:
    """Cumulative lengths of causal documents; None where a mask is something else. A document of one query has no band."""
    q_cuts, k_cuts = [0], [0]
    for cell in mask.cells:
        rows = cell.q_stop - cell.q_start
        causal = cell.upper == cell.k_stop - cell.q_stop or (cell.upper is None and rows == 1)
        if (
            cell.lower is not None
            or cell.batch
            or not causal
            or cell.q_start != q_cuts[-1]
            or cell.k_start < k_cuts[-1]
        ):
            return None
        if cell.k_start > k_cuts[-1]:  # keys of documents without queries
            q_cuts.append(cell.q_start)
            k_cuts.append(cell.k_start)
        q_cuts.append(cell.q_stop)
        k_cuts.append(cell.k_stop)
    return tuple(q_cuts), tuple(k_cuts)


def whole_numbers(name: str, given: Any) -> Cuts:
    """A list or integer tensor as a tuple; nothing is rounded."""
    if given is None:
        return None
    try:
        return tuple(map(index, given.tolist() if isinstance(given, Tensor) else given))
    except TypeError as error:
        kind = f"a {given.dim()}-D tensor of {given.dtype}" if isinstance(given, Tensor) else repr(given)
        raise ValueError(f"{name} is {kind}; give a list or a 1-D tensor of whole numbers") from error


def kept_rows(keep: Any, k: Tensor) -> Tensor | None:
    """Ascending int64 rows of k beside it, each once."""
    if keep is None:
        return None
    try:
        rows = torch.as_tensor(keep, device=k.device)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"keep is {keep!r}; give a list or a 1-D tensor of row numbers of k") from error
    if rows.dim() != 1 or (rows.numel() and rows.is_floating_point()) or rows.dtype == torch.bool:
        raise ValueError(f"keep has shape {tuple(rows.shape)} and dtype {rows.dtype}; give a list of row numbers of k")
    rows = rows.long().unique()
    if len(rows) and not (int(rows[0]) >= 0 and int(rows[-1]) < k.shape[1]):
        raise ValueError(f"keep has rows {int(rows[0])} to {int(rows[-1])}; k has rows 0 to {k.shape[1] - 1}")
    return rows if len(rows) else None

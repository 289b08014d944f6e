"""Products of rows and keys, reduced over the rows before they leave the cache.

A row's anchor rides along as one more dim: [scale * q, -anchor] . [k, 1] = score - anchor, so a test is one matrix product and
one maximum. In bfloat16 the anchor takes two dims, what it rounds to and the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS_AT_ONCE = 1024
"""Columns of one product: with a thousand rows it fills a second-level cache and no more."""


def test_dtype(x: Tensor, scores: str) -> torch.dtype:
    """The dtype in which columns are tested: bfloat16 for float32 on processors that multiply it natively, if "auto"."""
    if scores == "auto" and x.dtype == torch.float32 and x.device.type == "cpu" and _native_bfloat16():
        return torch.bfloat16
    return x.dtype


def _native_bfloat16() -> bool:
    told = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(told.get("avx512_bf16") or told.get("amx_bf16"))


def with_anchor(q: Tensor, anchor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """(Hq, rows, D + 1 or D + 2): scaled queries (rows, Hq, D) and minus their anchors (Hq, rows)."""
    rows = q.transpose(0, 1).to(anchor.dtype) * scale
    parts = [rows.to(dtype), -anchor.unsqueeze(2).to(dtype)]
    if torch.finfo(dtype).bits < 32:
        parts.append((-anchor.unsqueeze(2) - parts[1].to(anchor.dtype)).to(dtype))
    return torch.cat(parts, 2)


def with_ones(k: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, Hkv, Sk, D + 1 or D + 2): keys that meet `with_anchor`."""
    more = 1 if torch.finfo(dtype).bits >= 32 else 2
    made = k.new_ones(k.shape[0], k.shape[2], k.shape[1], k.shape[3] + more, dtype=dtype)
    made[..., : k.shape[3]] = k.transpose(1, 2)
    return made


def column_maximum(rows: Tensor, keys: Tensor) -> Tensor:
    """(n, C): for each of n stacks of rows (n, R, d), the largest product with each key (C, d)."""
    flat, columns = rows.flatten(0, 1), keys.shape[0]
    best = rows.new_empty(rows.shape[0], columns)
    for first in range(0, columns, COLUMNS_AT_ONCE):
        products = torch.mm(flat, keys[first : first + COLUMNS_AT_ONCE].T).view(*rows.shape[:2], -1)
        torch.amax(products, 1, out=best[:, first : first + COLUMNS_AT_ONCE])
    return best

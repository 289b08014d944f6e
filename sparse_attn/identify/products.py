"""Products of rows and keys, reduced over the rows before they leave the cache.

The least score that a row keeps rides along as one more dim: [scale * q, -least] . [k, 1] = score - least, so a column is kept
where the product's sign is not minus. In bfloat16 `least` takes two dims, what it rounds to and the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

COLUMNS_AT_ONCE = 1024
"""Columns of one product: with a thousand rows it fills a second-level cache and no more."""
COLUMNS_ALIKE = 128
"""In 16 bits the columns of a product are a multiple of this: its code is made anew for every new shape, in a millisecond."""
EARLY = 8
"""Of so many rows one asks about every column: what it keeps need not be asked again."""
SETTLED = 0.15
"""Share of columns kept by the rows that ask first below which the others ask about all: setting columns apart costs more."""
WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers as wide as floats of so many bytes."""


def test_dtype(x: Tensor, scores: str) -> torch.dtype:
    """The dtype in which columns are tested: bfloat16 for float32 on processors that multiply it natively, if "auto"."""
    if scores == "auto" and x.dtype == torch.float32 and x.device.type == "cpu" and _native_bfloat16():
        return torch.bfloat16
    return x.dtype


def _native_bfloat16() -> bool:
    told = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(told.get("avx512_bf16") or told.get("amx_bf16"))


def least_scores(lse: Tensor, thetas: Sequence[float], dtype: torch.dtype) -> Tensor:
    """(B, Hq, rows): the least score that each row keeps, lse - theta."""
    return lse - finite_thetas(lse, thetas, dtype)[:, None]


def finite_thetas(lse: Tensor, thetas: Sequence[float], dtype: torch.dtype) -> Tensor:
    """(Hq): thetas in the dtype of `lse`; an infinite one becomes one that `dtype` can hold."""
    most = min(1e30, torch.finfo(dtype).max / 4)
    return lse.new_tensor(thetas).clamp(-most, most)


def with_least(q: Tensor, least: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """(Hq, rows, D + 1 or D + 2): scaled queries (rows, Hq, D) and minus the least scores that they keep (Hq, rows)."""
    return beside(q.transpose(0, 1).to(least.dtype) * scale, least, dtype)


def beside(rows: Tensor, least: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., D + 1 or D + 2): scaled rows (..., D) and minus the least scores that they keep (...)."""
    parts = [rows.to(dtype), -least.unsqueeze(-1).to(dtype)]
    if torch.finfo(dtype).bits < 32:
        parts.append((-least.unsqueeze(-1) - parts[1].to(least.dtype)).to(dtype))
    return torch.cat(parts, -1)


def with_ones(k: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, Hkv, Sk, D + 1 or D + 2): keys that meet `with_least`."""
    more = 1 if torch.finfo(dtype).bits >= 32 else 2
    made = k.new_empty(k.shape[0], k.shape[2], k.shape[1], k.shape[3] + more, dtype=dtype)
    made[..., : k.shape[3]], made[..., k.shape[3] :] = k.transpose(1, 2), 1
    return made


def reached(rows: Tensor, keys: Tensor) -> Tensor:
    """bool (n, C): for each of n stacks of rows (n, R, d), whether some row's product with each key (C, d) is 0 or more."""
    flat, columns = rows.flatten(0, 1), keys.shape[0]
    found = torch.empty(rows.shape[0], columns, dtype=torch.bool, device=rows.device)
    memory = rows.new_empty(flat.shape[0] * min(columns + COLUMNS_ALIKE, COLUMNS_AT_ONCE))
    for first, some in runs(keys):
        products = memory[: flat.shape[0] * len(some)].view(-1, len(some))
        torch.mm(flat, some.T, out=products)
        found[:, first : first + len(some)] = none_minus(products.view(*rows.shape[:2], -1), 1)[:, : columns - first]
    return found


def runs(keys: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Keys (C, ...) in runs of few lengths, and where each begins: the last run takes keys again to be a multiple, or zeros.

    >>> [(first, len(some)) for first, some in runs(torch.zeros(1500, 4, dtype=torch.bfloat16))]
    [(0, 1024), (988, 512)]
    >>> [(first, len(some)) for first, some in runs(torch.zeros(100, 4, dtype=torch.bfloat16))]
    [(0, 128)]
    """
    multiple = COLUMNS_ALIKE if keys.element_size() == 2 else 1
    for first in range(0, keys.shape[0], COLUMNS_AT_ONCE):
        length = -(-min(COLUMNS_AT_ONCE, keys.shape[0] - first) // multiple) * multiple
        start = max(0, min(first, keys.shape[0] - length))
        some = keys[start : start + length]
        yield start, some if len(some) == length else pad(some, (0, 0) * (keys.dim() - 1) + (0, length - len(some)))


def parted(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows (..., R, d) those that ask first, every so many, and the others."""
    ordered = rows.index_select(-2, _early_first(rows.shape[-2]).to(rows.device))
    return ordered.tensor_split([-(-rows.shape[-2] // EARLY)], -2)


@lru_cache(maxsize=64)
def _early_first(count: int) -> Tensor:
    numbers = torch.arange(count)
    return torch.cat([numbers[::EARLY], numbers[numbers % EARLY > 0]])


def reached_early(rows: Sequence[Tensor], keys: Tensor) -> Tensor:
    """bool (C,): as `reached`, for one stack of rows that was parted. What the first ones keep the others need not ask about."""
    found = reached(rows[0][None], keys)[0]
    if not len(rows[1]):
        return found
    if int(found.sum()) < SETTLED * len(found):
        return found.logical_or_(reached(rows[1][None], keys)[0])
    left = (~found).nonzero()[:, 0]
    found[left] = reached(rows[1][None], keys.index_select(0, left))[0]
    return found


def none_minus(products: Tensor, dim: int) -> Tensor:
    """bool: where some entry along `dim` has no minus sign; whole numbers of the same bits tell, and are compared faster."""
    return products.view(WHOLE[products.element_size()]).amax(dim) >= 0

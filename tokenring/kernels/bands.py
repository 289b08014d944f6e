"""Any band, for a back end that knows full, causal and masked attention.

A band bounds key index - query index inside a rectangle from below, above, both or neither. A back end's call knows less:
every pair, causal (key index <= query index), or an additive mask. So

    no bound, upper = 0     one call
    upper > 0               the first `upper` keys full, the rest causal; the two partials merge
    upper = 0, many rows    where a causal call also computes much of what it then leaves out: halved again and again into
                            squares, which are full, and small causal triangles
    a lower bound           blocks of query rows, each over the keys that its rows see, with a mask where the band cuts
                            through; in a wide band the keys that every row of a block sees need none

Blocks are short beside the band, because a block reads every pair of its rows and keys: W + rows - 1 keys a row for a band W
wide. Every call has one key or more for each of its rows. Forward partials of a row merge by online softmax and gradients add
up, both in the accumulator dtype and in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenring.merge import accumulator_dtype, merge_

Queries = tuple[Tensor, Tensor, Tensor, Tensor]
"""q, do, out (B, S, H, D) and lse (B, H, S); `out` for its product with do alone, see `delta.py`."""
Attend = Callable[[Tensor, Tensor, Tensor, bool, Tensor | None], tuple[Tensor, Tensor]]
"""(q, k, v, causal, mask) -> out, lse."""
Differentiate = Callable[[Queries, Tensor, Tensor, bool, Tensor | None], tuple[Tensor, Tensor, Tensor]]
"""(queries, k, v, causal, mask) -> dq, dk, dv."""


class Sizes(NamedTuple):
    """What is quick for a back end. block: how many query rows a block has, from the width of the band in keys.
    causal: the most rows that a causal call should have; None for any number.
    """

    block: Callable[[int], int]
    causal: int | None = None


_ALIGNED = 64
"""Halves start at multiples of so many rows, in which matrix products are done."""
MASKED_KEYS = 2048
"""The longest block that is one masked call: beyond, a mask costs more memory than two more calls cost time."""


def attend(
    call: Attend, sizes: Sizes, q: Tensor, k: Tensor, v: Tensor, lower: int | None, upper: int | None
) -> tuple[Tensor, Tensor]:
    """out in q's dtype and lse of a rectangle under a band; shapes as in `BlockKernel.block`."""
    reached = seen(q.shape[1], k.shape[1], upper)
    if reached < k.shape[1]:
        k, v = k[:, :reached], v[:, :reached]
    lower, upper = binding(q.shape[1], k.shape[1], lower, upper)
    if lower is not None:
        return _attend_in_blocks(call, sizes.block, q, k, v, lower, upper)
    if upper is None:
        return call(q, k, v, False, None)
    if upper == 0:
        return _attend_causal(call, sizes.causal, q, k, v)
    out, lse = call(q, k[:, :upper], v[:, :upper], False, None)
    out = out.to(accumulator_dtype(q.dtype))
    merge_(out, lse, *_attend_causal(call, sizes.causal, q, k[:, upper:], v[:, upper:]))
    return out.to(q.dtype), lse


def differentiate(
    call: Differentiate,
    sizes: Sizes,
    queries: Queries,
    k: Tensor,
    v: Tensor,
    lower: int | None,
    upper: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of a rectangle under a band, in the call's dtype or the accumulator's."""
    unseen = k.shape[1] - seen(queries[0].shape[1], k.shape[1], upper)
    if unseen:
        k, v = k[:, :-unseen], v[:, :-unseen]
        dq, dk, dv = differentiate(call, sizes, queries, k, v, lower, upper)
        return dq, pad(dk, (0, 0, 0, 0, 0, unseen)), pad(dv, (0, 0, 0, 0, 0, unseen))
    lower, upper = binding(queries[0].shape[1], k.shape[1], lower, upper)
    if lower is not None:
        return _differentiate_in_blocks(call, sizes.block, queries, k, v, lower, upper)
    if upper is None:
        return call(queries, k, v, False, None)
    if upper == 0:
        return _differentiate_causal(call, sizes.causal, queries, k, v)
    near = call(queries, k[:, :upper], v[:, :upper], False, None)
    far = _differentiate_causal(call, sizes.causal, queries, k[:, upper:], v[:, upper:])
    dk, dv = (torch.cat(parts, dim=1) for parts in zip(near[1:], far[1:]))
    return near[0].to(accumulator_dtype(k.dtype)).add_(far[0]), dk, dv


def window(rows: int, keys: int, lower: int | None, upper: int | None) -> tuple[int, int | None, int | None]:
    """A band as flash attention says it: how many keys some row sees, and the window (left, right), None for no bound.

    The window's diagonal ends in the last query and the last key: row i sees i + keys - rows - left .. i + keys - rows + right.

    >>> window(4, 6, lower=None, upper=2), window(4, 6, lower=-1, upper=0), window(4, 6, lower=-9, upper=5)
    ((6, None, 0), (4, 1, 0), (6, None, None))
    """
    keys = seen(rows, keys, upper)
    lower, upper = binding(rows, keys, lower, upper)
    diagonal = keys - rows
    return keys, None if lower is None else diagonal - lower, None if upper is None else upper - diagonal


def seen(rows: int, keys: int, upper: int | None) -> int:
    """How many keys lie before the first that no row may see."""
    return keys if upper is None else min(keys, rows + upper)


def binding(rows: int, keys: int, lower: int | None, upper: int | None) -> tuple[int | None, int | None]:
    """The bounds that some pair of the rectangle is outside of."""
    return (
        None if lower is None or lower <= 1 - rows else lower,
        None if upper is None or upper >= keys - 1 else upper,
    )


def _attend_causal(call: Attend, most: int | None, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Row i sees keys 0..i. No more keys than rows."""
    if most is None or q.shape[1] <= most:
        return call(q, k, v, True, None)
    wide = accumulator_dtype(q.dtype)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=wide, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide, device=q.device)
    for rows, keys, causal in _triangle(q.shape[1], k.shape[1], most):
        part = call(q[:, rows], k[:, keys], v[:, keys], causal, None)
        if causal or rows.start >= k.shape[1]:
            out[:, rows], lse[:, :, rows] = part
        else:
            merge_(out[:, rows], lse[:, :, rows], *part)
    return out.to(q.dtype), lse


def _differentiate_causal(
    call: Differentiate, most: int | None, queries: Queries, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if most is None or queries[0].shape[1] <= most:
        return call(queries, k, v, True, None)
    dq, dk, dv = (torch.empty_like(x, dtype=accumulator_dtype(k.dtype)) for x in (queries[0], k, v))
    for rows, keys, causal in _triangle(dq.shape[1], k.shape[1], most):
        mine = (*(x[:, rows] for x in queries[:3]), queries[3][:, :, rows])
        grads = call(mine, k[:, keys], v[:, keys], causal, None)
        for total, at, grad in zip((dq, dk, dv), (rows, keys, keys), grads):
            if causal or (total is dq and rows.start >= k.shape[1]):
                total[:, at] = grad
            else:
                total[:, at] += grad
    return dq, dk, dv


def _triangle(rows: int, keys: int, most: int) -> Iterator[tuple[slice, slice, bool]]:
    """The rectangles of rows and keys of a causal band, and which are causal themselves.

    A causal one is the first of its rows and keys; rows past the last key have one rectangle.

    >>> [(rows.start, rows.stop, keys.start, keys.stop, causal) for rows, keys, causal in _triangle(5, 4, 2)]
    [(0, 2, 0, 2, True), (2, 4, 2, 4, True), (2, 4, 0, 2, False), (4, 5, 0, 4, False)]
    """
    yield from _halves(0, min(rows, keys), most)
    if rows > keys:
        yield slice(keys, rows), slice(0, keys), False


def _halves(first: int, last: int, most: int) -> Iterator[tuple[slice, slice, bool]]:
    if last - first <= most:
        yield slice(first, last), slice(first, last), True
        return
    half = (last - first + 1) // 2
    middle = first + -(-half // _ALIGNED) * _ALIGNED if half > _ALIGNED else first + half
    yield from _halves(first, middle, most)
    yield from _halves(middle, last, most)
    yield slice(middle, last), slice(first, middle), False


def _attend_in_blocks(
    call: Attend, block_rows: Callable[[int], int], q: Tensor, k: Tensor, v: Tensor, lower: int, upper: int | None
) -> tuple[Tensor, Tensor]:
    masks = _Masks(lower, upper, q)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulator_dtype(q.dtype), device=q.device)
    for rows, parts in _blocks(q.shape[1], k.shape[1], lower, upper, block_rows):
        total: tuple[Tensor, Tensor] | None = None
        for keys, cut in parts:
            part = call(q[:, rows], k[:, keys], v[:, keys], False, masks(rows, keys) if cut else None)
            if total is None:
                total = part
                continue
            total = total[0].to(lse.dtype), total[1]
            merge_(*total, *part)
        assert total is not None
        out[:, rows], lse[:, :, rows] = total
    return out, lse


def _differentiate_in_blocks(
    call: Differentiate,
    block_rows: Callable[[int], int],
    queries: Queries,
    k: Tensor,
    v: Tensor,
    lower: int,
    upper: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    masks = _Masks(lower, upper, queries[0])
    wide = accumulator_dtype(k.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (queries[0], k, v))
    for rows, parts in _blocks(dq.shape[1], k.shape[1], lower, upper, block_rows):
        mine = (*(x[:, rows] for x in queries[:3]), queries[3][:, :, rows])
        for keys, cut in parts:
            grads = call(mine, k[:, keys], v[:, keys], False, masks(rows, keys) if cut else None)
            for total, at, grad in zip((dq, dk, dv), (rows, keys, keys), grads):
                total[:, at] += grad
    return dq, dk, dv


def _blocks(
    rows: int, keys: int, lower: int, upper: int | None, block_rows: Callable[[int], int]
) -> Iterator[tuple[slice, list[tuple[slice, bool]]]]:
    """Query rows, and the key ranges that they see together, each with whether the band cuts through it."""
    step = block_rows(min(keys, keys if upper is None else upper - lower + 1))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        start, stop = max(0, first + lower), keys if upper is None else min(keys, last + upper)
        # The end parts overlap the keys that all rows see by one, so that no row of theirs is without a key.
        inner = max(start, last + lower), stop if upper is None else min(stop, first + upper)
        ends = [(start, inner[0])] * (last - 1 + lower > start), [(inner[1], stop)] * (inner[1] < stop - 1)
        if not any(ends):
            yield slice(first, last), [(slice(start, stop), False)]
        elif stop - start <= MASKED_KEYS or inner[1] - inner[0] <= MASKED_KEYS // 2:
            yield slice(first, last), [(slice(start, stop), True)]
        else:
            middle = inner[0] if ends[0] else start, inner[1] if ends[1] else stop
            parts = [*((part, True) for part in ends[0]), (middle, False), *((part, True) for part in ends[1])]
            yield slice(first, last), [(slice(*part), cut) for part, cut in parts]


class _Masks:
    """0 inside the band and -inf outside; blocks that lie alike share one."""

    def __init__(self, lower: int, upper: int | None, like: Tensor) -> None:
        self.lower, self.upper, self.like = lower, upper, like
        self.made: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, rows: slice, keys: slice) -> Tensor:
        shape, offset = (rows.stop - rows.start, keys.stop - keys.start), keys.start - rows.start
        if (*shape, offset) not in self.made:
            outside = torch.full(shape, -torch.inf, dtype=self.like.dtype, device=self.like.device)
            mask = outside.tril(self.lower - offset - 1)
            self.made[*shape, offset] = mask if self.upper is None else mask + outside.triu(self.upper - offset + 1)
        return self.made[*shape, offset]

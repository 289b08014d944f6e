"""Any band, for a back end that knows full, causal and masked attention.

A band bounds key index - query index inside a rectangle from below, above, both or neither. A back end's call knows less:
every pair, causal (key index <= query index), or an additive mask. So

    no bound, upper = 0     one call
    upper > 0               the first `upper` keys full, the rest causal; the two partials merge
    a lower bound           blocks of query rows, each over the keys that its rows see, with a mask where the band cuts
                            through; in a wide band the keys that every row of a block sees need none

Blocks are short beside the band, because a block reads every pair of its rows and keys: W + rows - 1 keys a row for a band W
wide. Every call has one key or more for each of its rows. Forward partials of a row merge by online softmax and gradients add
up, both in the accumulator dtype and in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
BlockRows = Callable[[int], int]
"""How many query rows a block has, from the width of the band in keys."""

MASKED_KEYS = 2048
"""The longest block that is one masked call: beyond, a mask costs more memory than two more calls cost time."""


def attend(
    call: Attend, block_rows: BlockRows, q: Tensor, k: Tensor, v: Tensor, lower: int | None, upper: int | None
) -> tuple[Tensor, Tensor]:
    """out in q's dtype and lse of a rectangle under a band; shapes as in `BlockKernel.block`."""
    k, v = (x[:, : seen(q.shape[1], k.shape[1], upper)] for x in (k, v))
    lower, upper = binding(q.shape[1], k.shape[1], lower, upper)
    if lower is not None:
        return _attend_in_blocks(call, block_rows, q, k, v, lower, upper)
    if upper is None or upper == 0:
        return call(q, k, v, upper == 0, None)
    out, lse = call(q, k[:, :upper], v[:, :upper], False, None)
    out = out.to(accumulator_dtype(q.dtype))
    merge_(out, lse, *call(q, k[:, upper:], v[:, upper:], True, None))
    return out.to(q.dtype), lse


def differentiate(
    call: Differentiate,
    block_rows: BlockRows,
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
        dq, dk, dv = differentiate(call, block_rows, queries, k, v, lower, upper)
        return dq, pad(dk, (0, 0, 0, 0, 0, unseen)), pad(dv, (0, 0, 0, 0, 0, unseen))
    lower, upper = binding(queries[0].shape[1], k.shape[1], lower, upper)
    if lower is not None:
        return _differentiate_in_blocks(call, block_rows, queries, k, v, lower, upper)
    if upper is None or upper == 0:
        return call(queries, k, v, upper == 0, None)
    near = call(queries, k[:, :upper], v[:, :upper], False, None)
    far = call(queries, k[:, upper:], v[:, upper:], True, None)
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


def _attend_in_blocks(
    call: Attend, block_rows: BlockRows, q: Tensor, k: Tensor, v: Tensor, lower: int, upper: int | None
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
    call: Differentiate, block_rows: BlockRows, queries: Queries, k: Tensor, v: Tensor, lower: int, upper: int | None
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
    rows: int, keys: int, lower: int, upper: int | None, block_rows: BlockRows
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

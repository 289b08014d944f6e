"""From chosen blocks, columns or diagonals to a plan: groups are the query blocks, and only they are exact by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Real

import torch
from torch import Tensor

from sparse_attn.arguments import check
from sparse_attn.geometry import Geometry
from sparse_attn.stripes import StripePlan


def whole_sequence(q: Tensor, k: Tensor, block: int) -> None:
    """ValueError unless queries and keys are one whole sequence, as all these methods take it, in blocks of a row or more."""
    at_least(1, block=block)
    check(q, k, k, None)
    if q.shape[1] != k.shape[1] or not q.shape[1]:
        raise ValueError(
            f"got {q.shape[1]} queries and {k.shape[1]} keys; the baselines take one whole sequence of a row or more"
        )


def geometry_of(q: Tensor, block: int, initial: int = 0, window: int = 0) -> Geometry:
    """Groups of one block of rows."""
    rows = (0, q.shape[1])
    return Geometry.of(((rows, rows),), block, 1, initial, window)


def each_head(q: Tensor, k: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries (S, D), scaled, and keys (S, D) of every query head, batch entries outermost, in the accumulator's dtype."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    each = q.shape[2] // k.shape[2]
    for entry in range(q.shape[0]):
        for head in range(q.shape[2]):
            yield q[entry, :, head].to(wide) * q.shape[-1] ** -0.5, k[entry, :, head // each].to(wide)


def block_means(x: Tensor, block: int) -> Tensor:
    """(blocks, D): means over runs of `block` rows of (S, D), the last one over what there is."""
    whole = x.shape[0] // block * block
    parts = [x[:whole].unflatten(0, (-1, block)).mean(1)] if whole else []
    return torch.cat([*parts, x[whole:].mean(0, keepdim=True)]) if whole < x.shape[0] else parts[0]


def causal_blocks(blocks: int, device: torch.device) -> Tensor:
    """bool (blocks, blocks): key blocks up to the query block's own."""
    return torch.ones(blocks, blocks, dtype=torch.bool, device=device).tril()


def plan_of_blocks(q: Tensor, k: Tensor, block: int, chosen: Sequence[Tensor], why: str) -> StripePlan:
    """From bool (query blocks, key blocks) of every head, in the order of `each_head`; a query block's own is always in."""
    inside = torch.arange(block, device=q.device)
    lists = [
        [(blocks[row, :row].nonzero() * block + inside).flatten() for row in range(blocks.shape[0])]
        for blocks in chosen
    ]
    return plan_of_lists(q, k, block, lists, why)


def plan_of_lists(q: Tensor, k: Tensor, block: int, lists: Sequence[Sequence[Tensor]], why: str) -> StripePlan:
    """From one ascending list of columns a query block of every head, in the order of `each_head`."""
    geometry = geometry_of(q, block)
    columns = [head[group] for group in range(len(geometry.groups)) for head in lists]
    return StripePlan.of_columns(geometry, (q.shape[0], q.shape[2], k.shape[2]), "query", columns, why=why)


def smallest_cover(weights: Tensor, share: float) -> Tensor:
    """bool like weights (rows, n): in each row the fewest largest entries whose sum reaches `share` of the row's."""
    ordered, order = weights.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    taken = before < share * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def at_least(least: int, **given: int) -> None:
    """ValueError unless all that is given, by name, are whole numbers of `least` or more."""
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}; give a whole number of {least} or more")


def share_between(name: str, value: float) -> None:
    """ValueError unless 0 <= value <= 1."""
    if not (isinstance(value, Real) and 0 <= value <= 1):
        raise ValueError(f"{name} is {value!r}; give a share from 0 to 1")

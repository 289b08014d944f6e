"""Tokens through their experts in parts: while the experts work on one part, the next is on its way, and the last on its way home.

    parts       1        2        3
    dispatch    1   2    3
    experts         1    2    3
    combine              1    2   3

The backward pass overlaps the same way, as each exchange's backward is an exchange of two halves as well.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe.dispatch.base import Dispatched, Dispatcher


def through_experts(
    d: Dispatcher,
    experts: Callable[[Dispatched], Tensor],
    tokens: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    chunks: int = 1,
    beside: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Dispatch, experts, combine. Collective over the dispatcher's block; every rank gives the same `chunks`.

    Args:
        d: the dispatcher.
        experts: what was dispatched -> (M, H), not weighted.
        tokens, ids, weights: as in `Dispatcher.dispatch`.
        chunks: in how many parts the tokens go.
        beside: (T, H) -> (T, H), computed while the first part travels and added to the result.

    >>> from moe import build_dispatcher
    >>> d = build_dispatcher("dedup", num_experts=2)
    >>> given = torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    >>> through_experts(d, lambda sent: 3 * sent.tokens, *given, chunks=2)[:, 0].tolist()
    [3.0, 3.0, 3.0, 3.0]
    """
    parts = list(zip(*(x.tensor_split(chunks) for x in (tokens, ids, weights))))
    ahead = d.start_dispatch(*parts[0])
    added = None if beside is None else beside(tokens)
    back = []
    for number in range(chunks):
        sent = ahead.wait()
        if number + 1 < chunks:
            ahead = d.start_dispatch(*parts[number + 1])
        back.append(d.start_combine(experts(sent), sent))
    out = torch.cat([part.wait() for part in back]) if chunks > 1 else back[0].wait()
    return out if added is None else out + added

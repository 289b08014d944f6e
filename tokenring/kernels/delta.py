"""An `out` for backward operators that want it only to form delta = rowsum(do * out).

The gradient of a block needs the whole row's delta, which is known, and not the block's out. Any tensor with that product
serves, and the multiple of `do` is one:

    out = do * delta / |do|^2

In 16 bits its rounding would move delta by some 1e-3, more than the true out does where a row sees one key. Then one half of
the dims carries delta, and the other what rounding took from it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def out_of(queries: tuple[Tensor, ...]) -> Tensor:
    """The `out` of (q, do, lse, delta, out), or one that serves where there are only four."""
    return queries[4] if len(queries) > 4 else out_of_delta(queries[1], queries[3])


def out_of_delta(do: Tensor, delta: Tensor) -> Tensor:
    """A tensor of do's shape and dtype with rowsum(do * out) = delta.

    Args:
        do: (B, S, H, D). delta: (B, H, S), float32, or float64 for float64.

    Rows of `do` whose square is below the smallest normal number count as zero.

    >>> do = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    >>> out_of_delta(do, torch.full((1, 1, 1), 50.0)).flatten()
    tensor([6., 8.])
    """
    missing = delta.transpose(1, 2)
    if do.dtype == delta.dtype:
        return _share(do, missing)
    half, limit = (do.shape[-1] + 1) // 2, torch.finfo(do.dtype).max
    first, second = (x.to(delta.dtype) for x in (do[..., :half], do[..., half:]))
    carried = _share(first, missing).clamp_(-limit, limit).to(do.dtype)
    missing = missing - first.mul_(carried).sum(-1)
    rest = _share(second, missing).clamp_(-limit, limit).to(do.dtype)
    return torch.cat([carried, rest], dim=-1)


def _share(do: Tensor, delta: Tensor) -> Tensor:
    # The norm makes no temporary of do's size, where a dot product would.
    squared = torch.linalg.vector_norm(do, dim=-1).square_().clamp_min_(torch.finfo(do.dtype).tiny)
    return do * (delta / squared).contiguous().unsqueeze(-1)

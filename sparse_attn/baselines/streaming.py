"""The A-shape of StreamingLLM (Xiao et al., arXiv 2309.17453): the first keys and a window of the latest."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.baselines.blocks import at_least, geometry_of, whole_sequence
from sparse_attn.stripes import StripePlan


def streaming(q: Tensor, k: Tensor, *, initial: int = 1024, local: int = 8192, block: int = 128) -> StripePlan:
    """Every row sees the first `initial` keys and at least the `local` latest (up to a block more, as block kernels do).

    >>> q, k = torch.randn(1, 1200, 2, 8), torch.randn(1, 1200, 1, 8)
    >>> streaming(q, k, initial=64, local=128, block=64).density < 0.6
    True
    """
    whole_sequence(q, k, block)
    at_least(0, initial=initial, local=local)
    geometry = geometry_of(q, block, initial, max(local - 1, 0))
    nothing = torch.empty(0, dtype=torch.int32, device=q.device)
    columns = [nothing] * (len(geometry.groups) * q.shape[0] * q.shape[2])
    shape = q.shape[0], q.shape[2], k.shape[2]
    return StripePlan.of_columns(geometry, shape, "query", columns, why=f"first {initial}, latest {local}")

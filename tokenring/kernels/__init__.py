"""Block kernels: attention of one query slot over one key slot, as (out, lse)."""

from __future__ import annotations

import torch

from tokenring.kernels.base import BlockKernel
from tokenring.kernels.cpu_flash import CpuFlashKernel
from tokenring.kernels.reference import ReferenceKernel

KERNELS: tuple[BlockKernel, ...] = (CpuFlashKernel(), ReferenceKernel())
"""In order of preference; the reference takes everything."""


def choose(kernel: str, q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> BlockKernel:
    """The kernel of a name, or for "auto" the first that can take these inputs."""
    by_name = {k.name: k for k in KERNELS}
    if kernel == "auto":
        return next(k for k in KERNELS if k.refuses(q, v, softcap) is None)
    if kernel not in by_name:
        raise ValueError(f"kernel is {kernel!r}; give one of auto, {', '.join(by_name)}")
    reason = by_name[kernel].refuses(q, v, softcap)
    if reason is not None:
        raise ValueError(f'kernel {kernel!r} cannot take this call: {reason}; use kernel="auto"')
    return by_name[kernel]

"""Block kernels: attention of one query slot over one key slot, as (out, lse).

name           runs on                              backward                        refuses
cpu_flash      CPUs                                 its own                         softcap, two head dims
cuda_sdpa      NVIDIA GPUs: torch's own operators   its own                         softcap, float64
flash_attn2..4 NVIDIA GPUs: the flash-attn package  4 its own up to 128 dims,       float32, float64
                                                    else cuda_sdpa, else reference
reference      any device                           its own                         nothing
"""

from __future__ import annotations

import torch

from tokenring.kernels.base import BlockKernel
from tokenring.kernels.cpu_flash import CpuFlashKernel
from tokenring.kernels.cuda_sdpa import CudaSdpaKernel
from tokenring.kernels.flash_attn import FlashAttnKernel
from tokenring.kernels.reference import ReferenceKernel

GPU_KERNELS: tuple[BlockKernel, ...] = (FlashAttnKernel(4), FlashAttnKernel(3), CudaSdpaKernel(), FlashAttnKernel(2))
"""In order of preference. torch's own flash operator is version 2's, and differentiates itself."""

KERNELS: tuple[BlockKernel, ...] = (CpuFlashKernel(), ReferenceKernel())
"""Those that take CPU tensors, in order of preference; the reference takes everything."""

FAMILIES = {"flash_attn": ("flash_attn4", "flash_attn3", "flash_attn2")}
"""Names that stand for the first of several kernels that takes the inputs."""


def choose(kernel: str, q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> BlockKernel:
    """The kernel of a name, or for "auto" the first that can take these inputs; its `name` says which.

    >>> q = torch.zeros(1, 4, 2, 8)
    >>> choose("auto", q, q, None).name, choose("auto", q, q, 30.0).name
    ('cpu_flash', 'reference')
    """
    on_cpu = kernel == "auto" and q.device.type == "cpu"
    by_name = {k.name: k for k in (KERNELS if on_cpu else (*GPU_KERNELS, *KERNELS))}
    if kernel != "auto" and kernel not in by_name and kernel not in FAMILIES:
        of_gpus = ", ".join((*FAMILIES, *(k.name for k in GPU_KERNELS)))
        anywhere = ", ".join(k.name for k in KERNELS)
        raise ValueError(f"kernel is {kernel!r}; give one of auto, {anywhere}, or for CUDA devices {of_gpus}")
    candidates = list(by_name) if kernel == "auto" else FAMILIES.get(kernel, (kernel,))
    reasons = {}
    for name in candidates:
        reasons[name] = by_name[name].refuses(q, v, softcap)
        if reasons[name] is None:
            return by_name[name]
    said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) if len(reasons) > 1 else reasons[kernel]
    raise ValueError(f'kernel {kernel!r} cannot take this call: {said}; use kernel="auto"')


def backward_kernel(kernel: BlockKernel, q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> BlockKernel:
    """The kernel that runs the backward of a forward of `kernel`: itself, save for some versions of flash-attn."""
    return kernel.backward_kernel(q, v, softcap) if isinstance(kernel, FlashAttnKernel) else kernel

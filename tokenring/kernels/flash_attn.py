"""The flash-attn packages, versions 2, 3 and 4, through their public calls alone.

    kernel         function                                   returns lse with       differentiates lse
    flash_attn2    flash_attn.flash_attn_func                 return_attn_probs      no
    flash_attn3    flash_attn_interface.flash_attn_func       return_attn_probs      no
    flash_attn4    flash_attn.cute.flash_attn_func            return_lse             yes

A block's gradient needs the whole row's lse and delta = rowsum(do * out), and autograd through a public call knows only the
block's own. The weights differ by a factor a row, share = exp(lse_block - lse):

    p = share p_block,   dv = p_block^T (share do)
    ds = p (do v^T - delta) = p_block ((share do) v^T - rowsum(share do * out_block) + dlse),
    dlse = rowsum(share do * out_block) - share delta

so a call that differentiates its lse gives the exact gradient, for the price of one more forward. Without that last term ds
sums to 0 along a block's row, which the gradient of a part of a row does not; so the backward of versions 2 and 3 is another
kernel's. `backward_kernel` says whose. All take grouped heads, windows about the diagonal that ends in the last query and the
last key, a scale and a softcap; other head dims than multiples of 8 are filled up with zeros.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tokenring.kernels import bands
from tokenring.kernels.base import BlockKernel
from tokenring.kernels.cuda_sdpa import CudaSdpaKernel, fill_heads, padded_dims, version_text
from tokenring.kernels.reference import ReferenceKernel

_MODULES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
_CAPABILITIES = {2: ((8, 0), (13, 0)), 3: ((9, 0), (10, 0)), 4: ((8, 0), (13, 0))}
"""From, and up to but without."""


class FlashAttnKernel(BlockKernel):
    """flash_attn_func of one version, where it is installed.

    Args:
        version: 2, 3 or 4.
        capability: the compute capability of a device.
        partners: kernels for a backward that this version does not have; the first that takes the inputs runs it.
    """

    def __init__(
        self,
        version: int,
        capability: Callable[[torch.device], tuple[int, int]] = torch.cuda.get_device_capability,
        partners: tuple[BlockKernel, ...] = (CudaSdpaKernel(), ReferenceKernel()),
    ) -> None:
        self.version, self.capability, self.partners = version, capability, partners
        self.name = f"flash_attn{version}"

    def refuses(self, q: Tensor, v: Tensor, softcap: float | None) -> str | None:
        if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
            return f"it takes float16 and bfloat16 on CUDA devices, not {q.dtype} on {q.device.type}"
        function = _function(self.version)
        if isinstance(function, str):
            return function
        at_least, below = _CAPABILITIES[self.version]
        has = self.capability(q.device)
        if not at_least <= has < below:
            span = f"from {version_text(at_least)} to below {version_text(below)}"
            return f"it needs a compute capability {span}, and {q.device} has {version_text(has)}"
        dims, most = max(q.shape[-1], v.shape[-1]), 128 if self.version == 4 and has[0] != 9 else 256
        return f"it takes head dims up to {most} on {q.device}, not {dims}" if dims > most else None

    def backward_kernel(self, q: Tensor, v: Tensor, softcap: float | None) -> BlockKernel:
        """The kernel that runs `block_backward` for these inputs: this one, or the first partner that takes them."""
        own = self.version == 4 and max(q.shape[-1], v.shape[-1]) <= 128
        if own and (9, 0) <= self.capability(q.device) < (12, 0):
            return self
        return next(kernel for kernel in self.partners if kernel.refuses(q, v, softcap) is None)

    def block(
        self, q: Tensor, k: Tensor, v: Tensor, lower: int | None, upper: int | None, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        dims, width = v.shape[-1], padded_dims(q.shape[-1], v.shape[-1])
        filled = (fill_heads(x, width) for x in (q, k, v))
        with torch.no_grad():
            out, lse = self._call(*filled, lower, upper, scale, softcap)
        return out[..., :dims], lse

    def block_backward(
        self,
        queries: tuple[Tensor, ...],
        k: Tensor,
        v: Tensor,
        lower: int | None,
        upper: int | None,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, do, lse, delta = queries[:4]
        kernel = self.backward_kernel(q, v, softcap)
        if kernel is not self:
            return kernel.block_backward(queries, k, v, lower, upper, scale, softcap)
        dims, width = (q.shape[-1], k.shape[-1], v.shape[-1]), padded_dims(q.shape[-1], v.shape[-1])
        with torch.enable_grad():
            leaves = [fill_heads(x, width).detach().requires_grad_() for x in (q, k, v)]
            out, own_lse = self._call(*leaves, lower, upper, scale, softcap)
        if not own_lse.requires_grad:
            raise ValueError(
                'kernel "flash_attn4" does not differentiate its lse in the version installed; '
                'upgrade flash-attn-4 to 4.0.0b5 or later, or use kernel="cuda_sdpa"'
            )
        share = torch.exp(own_lse.detach() - lse)
        do = fill_heads((do * share.transpose(1, 2).unsqueeze(-1)).to(q.dtype), width)
        own_delta = torch.linalg.vecdot(do.to(lse.dtype), out.detach().to(lse.dtype)).transpose(1, 2)
        grads = torch.autograd.grad((out, own_lse), leaves, (do, own_delta - share * delta))
        dq, dk, dv = (grad[..., :size] for grad, size in zip(grads, dims))
        return dq, dk, dv

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, lower: int | None, upper: int | None, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        function = _function(self.version)
        assert not isinstance(function, str), function
        keys, left, right = bands.window(q.shape[1], k.shape[1], lower, upper)
        causal = (left, right) == (None, 0)
        sides: tuple[int | None, int | None] = (None, None) if causal else (left, right)
        if self.version < 4:
            sides = tuple(-1 if side is None else side for side in sides)
        options = {"softmax_scale": scale, "causal": causal, "window_size": sides, "softcap": softcap or 0.0}
        if self.version == 4:
            options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        out, lse, *_ = function(q, k[:, :keys], v[:, :keys], **options, **{_LSE[self.version]: True})
        return out, lse


_LSE = {2: "return_attn_probs", 3: "return_attn_probs", 4: "return_lse"}


@cache
def _function(version: int) -> Callable[..., Any] | str:
    """flash_attn_func of a version, or why there is none; a failed import is not tried again."""
    try:
        function = importlib.import_module(_MODULES[version]).flash_attn_func
    except Exception as error:  # a compiled package that does not fit its torch or driver fails in ways of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"{_MODULES[version]} cannot be imported ({reason})"
    wanted = {"softmax_scale", "causal", "window_size", "softcap", _LSE[version]}
    missing = sorted(wanted - set(inspect.signature(function).parameters))
    return (
        f"{_MODULES[version]}.flash_attn_func has no {', '.join(missing)}; install a later version"
        if missing
        else function
    )

"""Which executor a name stands for. Optional ones are imported here, when asked for by name."""

from __future__ import annotations

from torch import Tensor

from sparse_attn.kernels.torch_kernel import TorchKernel


def executor(name: str, q: Tensor, v: Tensor, scale: float) -> TorchKernel:
    """The executor of both passes.

    Args:
        name: "triton" or "flashinfer", or the name of a block kernel of tokenring ("auto" picks one) under the torch executor.

    Raises:
        ValueError: the executor's package is not installed, or it cannot take the tensors.

    >>> import torch
    >>> x = torch.zeros(1, 4, 1, 8)
    >>> type(executor("auto", x, x, 1.0)).__name__
    'TorchKernel'
    """
    if name == "triton":
        try:
            from sparse_attn.kernels.triton_stripes import TritonKernel
        except ImportError as error:
            raise ValueError('kernel="triton" needs the package triton; install it, or use kernel="auto"') from error
        return TritonKernel("auto", q, v, scale)
    if name == "flashinfer":
        try:
            from sparse_attn.kernels.flashinfer_stripes import FlashInferKernel
        except ImportError as error:
            raise ValueError('kernel="flashinfer" needs flashinfer-python; install it, or use kernel="auto"') from error
        return FlashInferKernel("auto", q, v, scale)
    return TorchKernel(name, q, v, scale)


def block_kernel(name: str) -> str:
    """The block kernel beneath an executor's name: backward runs on it."""
    return "auto" if name in ("triton", "flashinfer") else name

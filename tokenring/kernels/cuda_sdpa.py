"""torch's own fused attention for NVIDIA GPUs: the two operators that return the log-sum-exp.

                  flash                                            efficient
    takes         float16, bfloat16, head dims up to 256           the rest: float32, older devices, longer heads
    needs         compute capability 8.0                           8.0 for bfloat16
    heads         grouped as they are                              one key head per query head: expanded here
    bands         any, in one call: a window about the diagonal    full, causal from the top left, additive mask: `bands.py`
                  that ends in the last query and the last key
    lse           (B, H, Sq)                                       (B, H, Sq up to a multiple of 32)

Both want head dims that are multiples of 8, and flash one for keys and values; scale is given, so zeros may fill heads up.

The operators are private, so this is the only file that names them; the reference kernel takes what this one refuses, and a
test holds the two equal where there is a GPU. The flash operator is whatever torch runs behind it: its own, or what
`torch.nn.attention.activate_flash_attention_impl` put there.

Gradients repeat bit for bit under `torch.use_deterministic_algorithms(True)`: both operators follow that switch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenring.kernels import bands
from tokenring.kernels.base import BlockKernel
from tokenring.kernels.delta import out_of

_OPERATORS = (
    "_flash_attention_forward",
    "_flash_attention_backward",
    "_efficient_attention_forward",
    "_efficient_attention_backward",
)
_CAUSAL_FROM_TOP_LEFT = 1
_LSE_ROWS = 32
"""The efficient operator's lse has a multiple of this many rows; +inf in the rows past the end makes their weights 0."""
_MASK_COLUMNS = 16
"""Rows of a mask start at multiples of this many elements."""


class CudaSdpaKernel(BlockKernel):
    """Every band on torch's flash or efficient operator, forward and backward.

    Args:
        operators: what has the four operators as attributes; torch's where not given. Tests give stand-ins.
        capability: the compute capability of a device.
    """

    name = "cuda_sdpa"

    def __init__(
        self,
        operators: Any = torch.ops.aten,
        capability: Callable[[torch.device], tuple[int, int]] = torch.cuda.get_device_capability,
    ) -> None:
        self.operators, self.capability = operators, capability

    def refuses(self, q: Tensor, v: Tensor, softcap: float | None) -> str | None:
        if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"it takes float16, bfloat16 and float32 on CUDA devices, not {q.dtype} on {q.device.type}"
        if torch.version.hip is not None:
            return "it is for NVIDIA GPUs, and this torch is built for ROCm"
        if softcap is not None:
            return "it has no softcap"
        if q.dtype == torch.bfloat16 and self.capability(q.device) < (8, 0):
            return (
                f"bfloat16 needs compute capability 8.0, and {q.device} has {version_text(self.capability(q.device))}"
            )
        missing = [name for name in _OPERATORS if not hasattr(self.operators, name)]
        return f"this torch build lacks {', '.join(missing)}" if missing else None

    def block(
        self, q: Tensor, k: Tensor, v: Tensor, lower: int | None, upper: int | None, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        dims, width = v.shape[-1], padded_dims(q.shape[-1], v.shape[-1])
        q, k, v = (fill_heads(x, width) for x in (q, k, v))
        if self._takes_flash(q):
            out, lse = self._flash(q, k, v, lower, upper, scale)
        else:
            k, v = (_expand(x, q.shape[2]) for x in (k, v))

            def call(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
                return self._efficient(q, k, v, causal, mask, scale)

            out, lse = bands.attend(call, _SIZES, q, k, v, lower, upper)
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
        q, do, lse = queries[:3]
        shapes, width = (q.shape, k.shape, v.shape), padded_dims(q.shape[-1], v.shape[-1])
        q, k, v, do, out = (fill_heads(x, width) for x in (q, k, v, do, out_of(queries)))
        if self._takes_flash(q):
            grads = self._flash_backward((q, do, out, lse), k, v, lower, upper, scale)
        else:
            k, v = (_expand(x, q.shape[2]) for x in (k, v))

            def call(
                queries: bands.Queries, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None
            ) -> tuple[Tensor, Tensor, Tensor]:
                return self._efficient_backward(queries, k, v, causal, mask, scale)

            grads = bands.differentiate(call, _SIZES, (q, do, out, lse), k, v, lower, upper)
        dq, dk, dv = (_reduce(grad, shape) for grad, shape in zip(grads, shapes))
        return dq, dk, dv

    def _takes_flash(self, q: Tensor) -> bool:
        return q.dtype != torch.float32 and q.shape[-1] <= 256 and self.capability(q.device) >= (8, 0)

    # -- flash: (B, S, H, D), any band in one call ---------------------------------------------------------------------

    def _flash(
        self, q: Tensor, k: Tensor, v: Tensor, lower: int | None, upper: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        keys, causal, sides = _window(q, k, lower, upper)
        out, lse, *_ = self.operators._flash_attention_forward(
            q,
            k[:, :keys],
            v[:, :keys],
            None,
            None,
            q.shape[1],
            keys,
            0.0,
            causal,
            False,
            scale=scale,
            window_size_left=sides[0],
            window_size_right=sides[1],
        )
        return out, lse

    def _flash_backward(
        self, queries: bands.Queries, k: Tensor, v: Tensor, lower: int | None, upper: int | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, do, out, lse = queries
        keys, causal, sides = _window(q, k, lower, upper)
        dq, dk, dv = self.operators._flash_attention_backward(
            do,
            q,
            k[:, :keys],
            v[:, :keys],
            out,
            lse.contiguous(),
            None,
            None,
            q.shape[1],
            keys,
            0.0,
            causal,
            torch.zeros(2, dtype=torch.uint64, device=q.device),
            torch.empty(0, device=q.device),
            scale=scale,
            window_size_left=sides[0],
            window_size_right=sides[1],
        )
        return dq, _lengthen(dk, k.shape[1]), _lengthen(dv, k.shape[1])

    # -- efficient: (B, S, H, D), equal heads --------------------------------------------------------------------------

    def _efficient(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        bias, custom = _bias(mask, q, k), _CAUSAL_FROM_TOP_LEFT if causal else 0
        out, lse, *_ = self.operators._efficient_attention_forward(
            q, k, v, bias, None, None, None, None, 0.0, custom, True, scale=scale
        )
        return out, lse[:, :, : q.shape[1]]

    def _efficient_backward(
        self, queries: bands.Queries, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, do, out, lse = queries
        rows, keys = q.shape[1], k.shape[1]
        lse = pad(lse, (0, -rows % _LSE_ROWS), value=torch.inf).contiguous()
        bias, custom = _bias(mask, q, k), _CAUSAL_FROM_TOP_LEFT if causal else 0
        unused = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = self.operators._efficient_attention_backward(
            do, q, k, v, bias, out, None, None, rows, keys, lse, 0.0, unused, unused, custom, False, scale=scale
        )
        return dq, dk, dv


def padded_dims(*dims: int) -> int:
    """The head dim that holds all of these: a multiple of 8, and 256 past 192, where some devices lack a backward up to 224."""
    width = -(-max(dims) // 8) * 8
    return 256 if 192 < width <= 256 else width


def fill_heads(x: Tensor, width: int) -> Tensor:
    """x with zeros in the head dims up to `width`."""
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))


def version_text(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _window(q: Tensor, k: Tensor, lower: int | None, upper: int | None) -> tuple[int, bool, tuple[int, int]]:
    """How many keys some row sees, whether the window is causal, and its sides, -1 for no bound."""
    keys, left, right = bands.window(q.shape[1], k.shape[1], lower, upper)
    return keys, (left, right) == (None, 0), (-1 if left is None else left, -1 if right is None else right)


def _lengthen(grad: Tensor, rows: int) -> Tensor:
    return grad if grad.shape[1] == rows else pad(grad, (0, 0, 0, 0, 0, rows - grad.shape[1]))


def _expand(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _reduce(grad: Tensor, shape: torch.Size) -> Tensor:
    """A gradient of filled-up, expanded heads as one of the heads that were given; groups add up in float32."""
    grad = grad[..., : shape[-1]]
    if grad.shape[2] == shape[2]:
        return grad
    return grad.unflatten(2, (shape[2], -1)).sum(dim=3, dtype=torch.float32)


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as (B, H, Sq, Sk), one copy for all batches and heads, its rows aligned."""
    if mask is None:
        return None
    aligned = pad(mask, (0, -mask.shape[1] % _MASK_COLUMNS))[:, : mask.shape[1]]
    return aligned.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])


def _block_rows(width: int) -> int:
    """Not measured: enough rows to fill a device with a few heads."""
    return max(512, min(width, 2048))


_SIZES = bands.Sizes(_block_rows)

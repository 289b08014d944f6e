"""How good a plan is: mass recall, output recall, and what a language model's logits lose.

Definitions, the same everywhere here:

    mass recall      mean over rows of the dense softmax weight that lies on kept keys, per batch entry and head
    beyond anchor    of the dense weight outside the anchor region, the share on kept keys: the region's first keys and
                     neighbours hold most weight in most heads, and hide what stripes miss
    output recall    share of output elements within a tolerance of dense attention's (AnchorAttention's own profiler)
    density          computed pairs / causal pairs, anchor region included (`StripePlan.density`)

No attention matrix is made: a row's recall is exp(lse over the plan's keys - lse over all keys).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax

from sparse_attn.api import execute
from sparse_attn.kernels.torch_kernel import TorchKernel
from sparse_attn.run import dense_attention
from sparse_attn.stripes import StripePlan

ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Recall:
    """Mass recall of each batch entry and head; `beyond` without the anchor region."""

    heads: Tensor
    """(B, Hq), or (layers, B, Hq) of `join`."""
    beyond: Tensor

    @classmethod
    def join(cls, layers: Sequence[Recall]) -> Recall:
        """The recalls of several layers as one."""
        return cls(torch.stack([r.heads for r in layers]), torch.stack([r.beyond for r in layers]))

    @property
    def mean(self) -> float:
        return float(self.heads.mean())

    @property
    def p5(self) -> float:
        """The fifth percentile over layers, entries and heads."""
        return float(self.heads.flatten().quantile(0.05))

    @property
    def minimum(self) -> float:
        return float(self.heads.min())

    def __float__(self) -> float:
        return self.mean


def mass_recall(q: Tensor, k: Tensor, plan: StripePlan, scale: float | None = None) -> Recall:
    """Mass recall of a plan, per head; memory linear in length.

    Args:
        q: (B, Sq, Hq, D). k: (B, Sk, Hkv, D).

    >>> from sparse_attn import AnchorConfig, plan
    >>> q, k = torch.randn(1, 200, 2, 16), torch.randn(1, 200, 1, 16)
    >>> found = plan(q, k, config=AnchorConfig(theta=1e9, block=8, step=2, dense="never"))
    >>> round(mass_recall(q, k, found).mean, 5)
    1.0
    """
    plan.check(q, k)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        kernel = TorchKernel("auto", q, k, scale)
        dense = dense_attention(kernel.blocks, q, k, k, plan.geometry)[1].double()
        kept = execute(plan, q, k, k, scale=scale, return_lse=True)[1].double()
        near = kernel.anchor(q, k, k, plan.geometry, plan.keep).lse.double()
    whole, inside = (kept - dense).exp().clamp(max=1), (near - dense).exp().clamp(max=1)
    outside = (1 - inside).sum(-1)
    found = ((whole - inside).clamp(min=0).sum(-1) / outside.clamp(min=1e-9)).masked_fill(outside < 1e-6, 1.0)
    return Recall(whole.mean(-1), found.clamp(max=1))


def output_recall(out: Tensor, dense: Tensor, tolerance: float = 0.01) -> float:
    """Share of elements with |out - dense| < tolerance.

    >>> output_recall(torch.tensor([0.0, 1.0]), torch.tensor([0.001, 1.2]))
    0.5
    """
    _same_shapes(out, dense)
    return float(((out.double() - dense.double()).abs() < tolerance).double().mean())


def output_error(out: Tensor, dense: Tensor) -> dict[str, float]:
    """Relative L2 error over all elements, and mean cosine of the rows of each head: {"relative": ..., "cosine": ...}."""
    _same_shapes(out, dense)
    out, dense = out.double(), dense.double()
    relative = (out - dense).norm() / dense.norm().clamp_min(1e-30)
    return {"relative": float(relative), "cosine": float(cosine_similarity(out, dense, dim=-1).mean())}


def _same_shapes(out: Tensor, dense: Tensor) -> None:
    if out.shape != dense.shape or not out.numel():
        raise ValueError(
            f"got outputs {tuple(out.shape)} and {tuple(dense.shape)}; give two of one shape, of an element or more"
        )


@dataclass(frozen=True)
class LogitsDifference:
    """What a model loses on one text, against the same model with dense attention."""

    nll: float
    """Mean negative log-likelihood of the next token, minus the dense model's: nats a token."""
    kl: float
    """Mean Kullback-Leibler divergence of the dense model's distribution from this one's: nats."""
    top1: float
    """Share of positions whose likeliest token is the same."""


def compare_logits(logits: Tensor, dense: Tensor, ids: Tensor) -> LogitsDifference:
    """Logits (S, vocab) of both models over the text `ids` (S,), paired position by position.

    >>> same = torch.randn(4, 7)
    >>> compare_logits(same, same, torch.tensor([1, 2, 3, 4]))
    LogitsDifference(nll=0.0, kl=0.0, top1=1.0)
    """
    if logits.dim() != 2 or logits.shape != dense.shape or ids.shape != logits.shape[:1]:
        raise ValueError(
            f"got logits {tuple(logits.shape)} and {tuple(dense.shape)} for ids {tuple(ids.shape)}; give (S, vocab) of both "
            "models and the (S,) ids of one text"
        )
    nll = kl = agree = 0.0
    count = ids.shape[0] - 1
    for first in range(0, count, ROWS_AT_ONCE):
        rows = slice(first, min(first + ROWS_AT_ONCE, count))
        mine, theirs = (log_softmax(x[rows].double(), -1) for x in (logits, dense))
        target = ids[first + 1 : rows.stop + 1, None].long()
        nll += float((theirs.gather(1, target) - mine.gather(1, target)).sum())
        kl += float((theirs.exp() * (theirs - mine)).sum())
        agree += float((mine.argmax(-1) == theirs.argmax(-1)).sum())
    return LogitsDifference(nll / max(1, count), kl / max(1, count), agree / max(1, count))

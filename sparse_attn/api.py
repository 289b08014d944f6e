"""The calls users make: `anchor_attention`, and its two halves `plan` and `execute`."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_attn.arguments import check, configuration, kept_rows, packed
from sparse_attn.autograd import Gradients, answer, differentiable
from sparse_attn.config import AnchorConfig
from sparse_attn.gradients import gradients
from sparse_attn.kernels.blocks import Blocks
from sparse_attn.kernels.choice import block_kernel
from sparse_attn.run import Run, opening, threads_of
from sparse_attn.stats import Stats
from sparse_attn.stripes import StripePlan
from tokenring import Layout, Mask

Numbers = Any
"""A list of whole numbers or an integer tensor."""


def anchor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: AnchorConfig | None = None,
    scale: float | None = None,
    mask: Mask | str = "causal",
    cu_seqlens: Numbers | None = None,
    kv_cu_seqlens: Numbers | None = None,
    keep: Numbers | None = None,
    plan: StripePlan | None = None,
    group: Any = None,
    layout: Layout | str = "zigzag",
    kv_layout: Layout | str | None = None,
    kernel: str = "auto",
    return_lse: bool = False,
    return_stats: bool = False,
) -> Any:
    """Causal attention over an anchor region and the key rows that matter: AnchorAttention (arXiv 2505.23520).

        out_i = softmax over I, W_g(i) and S_g(i) of (scale * q_i . k_j)  v_j

    I is the initial block, W_g a window up to the diagonal, S_g the columns that row i's group keeps because for some of its
    rows anchor - score <= theta. With theta = infinity the three are all keys up to i: dense attention.

    Args:
        q: (B, Sq, Hq, D). k: (B, Sk, Hkv, D). v: (B, Sk, Hkv, Dv); Hq a multiple of Hkv, Sq <= Sk. Queries are the last rows
            of their sequence (chunked prefill, prefix cache). float16, bfloat16, float32 or float64.
        config: `AnchorConfig()` where not given.
        scale: 1 / sqrt(D) where not given.
        mask: "causal", or a causal `tokenring.Mask` of documents; other masks are refused.
        cu_seqlens, kv_cu_seqlens: documents packed in the sequence, each from 0 to the sequence's length.
        keep: rows of k that every later group sees, as part of its anchor region: visual tokens of a multimodal prompt.
        plan: use these columns (see `plan`); leave config, documents and keep out then.
        group: ProcessGroup, 1-D DeviceMesh or LocalGroup: q, k and v are this rank's rows, and only wanted rows of keys and
            values travel (see `sparse_attn.distributed.attend`). None: one device.
        layout, kv_layout: with a group, which rows each rank holds: a Layout, or a name where every rank holds equally many;
            kv_layout where keys and values are cut differently from queries (rows on top of a spread cache).
        kernel: "auto", "triton", "flashinfer", or the name of a block kernel of tokenring.
        return_lse: also lse. return_stats: also `Stats`.

    Returns:
        out (B, Sq, Hq, Dv) in q's dtype; lse (B, Hq, Sq) float32 (float64 for float64), natural log. Differentiable in
        q, k and v, the columns being constants.

    Raises:
        ValueError: arguments that do not fit together, or that cannot be honoured.

    >>> q, k, v = torch.randn(1, 300, 4, 16), torch.randn(1, 300, 2, 16), torch.randn(1, 300, 2, 16)
    >>> out, stats = anchor_attention(q, k, v, config=AnchorConfig(block=16, step=2, dense="never"), return_stats=True)
    >>> out.shape, stats.path
    (torch.Size([1, 300, 4, 16]), 'sparse')
    """
    if group is not None:
        from sparse_attn.distributed.api import attend  # it builds on this package

        where = {"group": group, "layout": layout, "kv_layout": kv_layout}
        rows = {"mask": mask, "cu_seqlens": cu_seqlens, "kv_cu_seqlens": kv_cu_seqlens, "keep": keep}
        how = {"config": config, "scale": scale, "plan": plan, "kernel": kernel}
        return attend(q, k, v, **where, **rows, **how, return_lse=return_lse, return_stats=return_stats)
    if layout != "zigzag" or kv_layout is not None:
        raise ValueError(
            f"got layout={layout!r}, kv_layout={kv_layout!r} without a group; give group= too, or leave them out on one device"
        )
    run = _prepared(q, k, v, config, scale, mask, cu_seqlens, kv_cu_seqlens, keep, plan, kernel)
    if torch.is_grad_enabled():
        with torch.no_grad():
            made = run.forward(q, k, v)
    else:  # entering a context is felt by short calls
        made = run.forward(q, k, v)
    assert run.plan is not None
    out, lse = differentiable(made, partial(_backward, run), q, k, v)
    if return_stats:
        run.stats.of_plan(run.plan)
    return answer(out, lse, run.stats, return_lse, return_stats)


def plan(
    q: Tensor,
    k: Tensor,
    *,
    config: AnchorConfig | None = None,
    scale: float | None = None,
    mask: Mask | str = "causal",
    cu_seqlens: Numbers | None = None,
    kv_cu_seqlens: Numbers | None = None,
    keep: Numbers | None = None,
    kernel: str = "auto",
) -> StripePlan:
    """The columns that `anchor_attention` would use, without values: phases 1 and 2. Arguments as there.

    >>> q, k = torch.randn(1, 300, 2, 16), torch.randn(1, 300, 1, 16)
    >>> found = plan(q, k, config=AnchorConfig(theta=1.0, block=16, step=2, dense="never"))
    >>> found.counts.shape, found.density < 1
    (torch.Size([10, 1, 2]), True)
    """
    run = _prepared(q, k, k, config, scale, mask, cu_seqlens, kv_cu_seqlens, keep, None, kernel)
    with torch.no_grad():
        return run.find(q, k)


def execute(
    plan: StripePlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    kernel: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Attention under a plan: phases 1 and 3. Differentiable; arguments and results as for `anchor_attention`.

    >>> q, k, v = torch.randn(1, 90, 2, 16), torch.randn(1, 90, 1, 16), torch.randn(1, 90, 1, 16)
    >>> found = globals()["plan"](q, k, config=AnchorConfig(block=16, step=1, dense="never"))
    >>> torch.allclose(execute(found, q, k, v), anchor_attention(q, k, v, plan=found))
    True
    """
    if plan is None:
        raise ValueError("execute got no plan; make one with sparse_attn.plan, or call anchor_attention")
    return anchor_attention(q, k, v, plan=plan, scale=scale, kernel=kernel, return_lse=return_lse)


def _prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: AnchorConfig | None,
    scale: float | None,
    mask: Mask | str,
    cu_seqlens: Numbers | None,
    kv_cu_seqlens: Numbers | None,
    keep: Numbers | None,
    plan: StripePlan | None,
    kernel: str,
) -> Run:
    check(q, k, v, scale)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if plan is not None:
        given = {"config": config, "cu_seqlens": cu_seqlens, "kv_cu_seqlens": kv_cu_seqlens, "keep": keep}
        told = [name for name, value in given.items() if value is not None] + (["mask"] if mask != "causal" else [])
        if told:
            raise ValueError(f"got plan= and {', '.join(told)}=; a plan says these itself: leave them out")
        if not isinstance(plan, StripePlan):
            raise ValueError(f"plan is a {type(plan).__name__}; give what sparse_attn.plan or a baseline returns")
        plan.check(q, k)
        return Run(plan.geometry, AnchorConfig(), scale, kernel, plan.keep, plan, Stats())
    config, cuts = configuration(config), packed(mask, cu_seqlens, kv_cu_seqlens)
    known = opening(q.shape, k.shape, v.shape[3], cuts, config, q.device, threads_of(q))
    return Run(known.geometry, config, scale, kernel, kept_rows(keep, k), known.plan, Stats(), known.sample, known.why)


def _backward(run: Run, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor) -> Gradients:
    assert run.plan is not None
    return gradients(Blocks.of(block_kernel(run.kernel), q, v, run.scale), run.plan, q, k, v, out, lse, do)

"""The call over ranks and its gradients: what `sparse_attn.anchor_attention(group=...)` runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_attn import cost
from sparse_attn.arguments import check, kept_rows, packed
from sparse_attn.config import AnchorConfig
from sparse_attn.distributed.backward import backward
from sparse_attn.distributed.call import Call
from sparse_attn.distributed.cut import cut_of
from sparse_attn.distributed.stats import RankStats
from sparse_attn.geometry import Geometry, documents_of
from sparse_attn.identify.products import test_dtype
from sparse_attn.kernels.choice import block_kernel, executor
from tokenring import AttentionShape, Layout, Mask, attention, connect, plan
from tokenring.agreement import refuse
from tokenring.transport import Transport

ALONE = ("plan", "kv_cu_seqlens")
"""What only a call on one device can honour."""


def attend(q: Tensor, k: Tensor, v: Tensor, *, group: Any, layout: Layout | str = "zigzag", **options: Any) -> Any:
    """AnchorAttention over a sequence that is spread over the ranks of a group; on every rank its rows of the one-device result.

    Args:
        q: (B, S_local, Hq, D), k: (B, S_local, Hkv, D), v: (B, S_local, Hkv, Dv): this rank's rows, in the order of
            `layout.positions(rank)`; shards may be uneven or empty.
        group: ProcessGroup, 1-D DeviceMesh, LocalGroup, or None for one rank.
        layout: a Layout, or a name where every rank holds equally many rows. Whole groups on a rank send least, and
            `group_layout` deals them out so that ranks have like work.
        options: as for `anchor_attention`; cu_seqlens, keep and masks of documents count positions of the whole sequence.

    Returns:
        As `anchor_attention`; `stats` is a `RankStats`. Differentiable in q, k and v; all ranks make the backward pass, or none.

    Raises:
        ValueError: arguments that do not fit together, before anything is sent; AgreementError on the other ranks, and on all
            where ranks disagree.
        TransportError: a transfer failed or timed out; it names rank, step and peer.

    >>> from tokenring import run_local
    >>> from sparse_attn import AnchorConfig, anchor_attention
    >>> q, k, v = torch.randn(1, 256, 4, 16), torch.randn(1, 256, 2, 16), torch.randn(1, 256, 2, 16)
    >>> config, cut = AnchorConfig(block=8, step=4, dense="never"), Layout.zigzag(256, 3)
    >>> def rank(group):
    ...     mine = (cut.shard(x, group.rank()) for x in (q, k, v))
    ...     return attend(*mine, group=group, layout=cut, config=config)
    >>> outs = run_local(3, rank)
    >>> whole = anchor_attention(q, k, v, config=config)
    >>> all(torch.allclose(out, cut.shard(whole, r), atol=1e-5) for r, out in enumerate(outs))
    True
    """
    runtime = connect(group)
    try:
        call = _prepared(runtime, layout, q, k, v, **options)
    except ValueError as error:
        refuse(runtime, error)
        raise
    with torch.no_grad():
        made = None if call.stats.path == "dense" else call.forward(q, k, v)
    if made is None:
        out, lse = _dense(call, q, k, v)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        out, lse = _Attention.apply(q, k, v, call, made)
    else:
        out, lse = made
    found: tuple[Any, ...] = (out.to(q.dtype),)
    if options.get("return_lse"):
        found += (lse,)
    if options.get("return_stats"):
        found += (call.stats,)
    return found[0] if len(found) == 1 else found


def _prepared(
    runtime: Transport,
    layout: Layout | str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: AnchorConfig | None = None,
    scale: float | None = None,
    mask: Mask | str = "causal",
    cu_seqlens: Any = None,
    keep: Any = None,
    kernel: str = "auto",
    return_lse: bool = False,
    return_stats: bool = False,
    **alone: Any,
) -> Call:
    _check(runtime, layout, q, k, v, scale, alone)
    cut = Layout.of(layout, q.shape[1], runtime.world)
    _check_layout(runtime, cut, q)
    config = AnchorConfig() if config is None else config
    config.thetas(q.shape[2])
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    cu_seqlens, _ = packed(mask, cu_seqlens, None)
    documents = documents_of(cut.total, cut.total, cu_seqlens, None)
    longest = max((b - a for _, (a, b) in documents), default=0)
    geometry = Geometry.of(documents, *cost.resolved(config, longest))
    rows = kept_rows(keep, q.new_empty(()).expand(1, cut.total))
    found = cut_of(geometry, cut.at(0), () if rows is None else tuple(rows.tolist()))
    executor(kernel, q, v, scale)  # a name that does not fit is refused before anything is sent
    stats = RankStats()
    _choose_path(stats, config, geometry, q, v)
    agreed = (config, scale, documents, found.keep, str(test_dtype(q, config.scores)), bool(return_stats))
    return Call(runtime, found, config, scale, kernel, stats, agreed, bool(return_stats))


def _check(
    runtime: Transport,
    layout: Layout | str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    alone: dict[str, Any],
) -> None:
    told = [name for name, value in alone.items() if value is not None]
    if unknown := set(alone) - set(ALONE):
        raise ValueError(f"got {', '.join(sorted(unknown))}=, which no call over ranks has")
    if told:
        raise ValueError(
            f"got {', '.join(told)}= and group=; over ranks columns are found by the call, for as many queries as keys"
        )
    check(q, k, v, scale)
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"rank {runtime.rank} of {runtime.world} got {q.shape[1]} queries and {k.shape[1]} keys; over ranks queries and keys "
            "are rows of one layout, so give as many of both (for a cached prefix use tokenring.attention)"
        )


def _check_layout(runtime: Transport, cut: Layout, q: Tensor) -> None:
    there = cut.length(runtime.rank) if runtime.rank < cut.world else 0
    if cut.world != runtime.world or there != q.shape[1]:
        raise ValueError(
            f"rank {runtime.rank} of {runtime.world} got {q.shape[1]} rows; its layout has {cut.world} ranks and gives it {there} "
            "rows: give the Layout that cut the sequence"
        )


def _choose_path(stats: RankStats, config: AnchorConfig, geometry: Geometry, q: Tensor, v: Tensor) -> None:
    """Plain attention where it is exact or modelled to be cheaper; alike on every rank, from what all of them know."""
    thetas = config.thetas(q.shape[2])
    stats.why = "asked for"
    if min(thetas) == math.inf:
        stats.path, stats.why = "dense", "theta keeps every column"
    elif config.dense == "auto" and max(thetas) > -math.inf:
        heads, dim = q.shape[0] * q.shape[2], (q.shape[3] + v.shape[3]) // 2
        worth, stats.why = cost.pays(geometry, config, heads, dim)
        stats.path = "sparse" if worth else "dense"


def _dense(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """tokenring's own attention, whose schedule chooses itself."""
    cuts = [0, *(stop for _, (_, stop) in call.cut.geometry.documents)]
    mask = Mask.causal() if len(cuts) < 3 else Mask.documents(cuts)
    layout, (batch, _, heads, dim) = call.cut.layout, q.shape
    shape = AttentionShape(batch, layout.total, layout.total, heads, k.shape[2], dim, v.shape[3], q.dtype)
    chosen = plan(world=layout.world, shape=shape, layout=layout, mask=mask)
    with call.stats.timed("dense"):
        found = attention(
            q,
            k,
            v,
            group=call.runtime,
            plan=chosen,
            scale=call.scale,
            kernel=block_kernel(call.kernel),
            return_lse=True,
        )
    call.stats.plans.append(chosen)
    call.stats.bytes_sent += chosen.bytes_sent(call.rank)
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, made: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        out, lse = made[0].to(q.dtype), made[1]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(ctx.call, *ctx.saved_tensors, do), None, None

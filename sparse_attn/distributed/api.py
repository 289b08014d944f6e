"""The call over ranks and its gradients: what `sparse_attn.anchor_attention(group=...)` runs."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_attn import cost
from sparse_attn.arguments import check, configuration, kept_rows, packed
from sparse_attn.autograd import answer, differentiable
from sparse_attn.config import AnchorConfig
from sparse_attn.distributed.backward import backward
from sparse_attn.distributed.call import Call
from sparse_attn.distributed.cut import cut_of
from sparse_attn.distributed.layouts import neighbouring
from sparse_attn.distributed.stats import RankStats
from sparse_attn.geometry import Geometry, documents_of, geometry_of
from sparse_attn.identify.products import test_dtype
from sparse_attn.kernels.choice import block_kernel, executor
from tokenring import AttentionShape, Layout, Mask, attention, connect, plan
from tokenring.agreement import refuse
from tokenring.transport import Transport


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any,
    layout: Layout | str = "zigzag",
    kv_layout: Layout | str | None = None,
    return_lse: bool = False,
    return_stats: bool = False,
    **options: Any,
) -> Any:
    """AnchorAttention over a sequence that is spread over the ranks of a group; on every rank its rows of the one-device result.

    Args:
        q: (B, Sq_local, Hq, D), k: (B, Sk_local, Hkv, D), v: (B, Sk_local, Hkv, Dv): this rank's rows, in the order of
            `layout.positions(rank)`; shards may be uneven or empty.
        group: ProcessGroup, 1-D DeviceMesh, LocalGroup, or None for one rank.
        layout: a Layout, or a name where every rank holds equally many rows. Whole groups on a rank send least, and
            `group_layout` deals them out so that ranks have like work.
        kv_layout: of keys and values, where they are cut differently: rows on top of a cache that is spread over the ranks,
            tokens that were dealt one at a time included. Queries are the last rows; the offset of `layout` says so, or is 0.
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
        call = _prepared(runtime, layout, kv_layout, q, k, v, reports=return_stats, **options)
    except Exception as error:  # whatever keeps this rank from the call, the others need not wait for it
        refuse(runtime, error)
        raise
    with torch.no_grad():
        made = None if call.stats.path == "dense" else call.forward(q, k, v)
    if made is None:
        out, lse = _dense(call, q, k, v)
    else:
        out, lse = differentiable(made, partial(backward, call), q, k, v)
    return answer(out, lse, call.stats, return_lse, return_stats)


def _prepared(
    runtime: Transport,
    layout: Layout | str,
    kv_layout: Layout | str | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    config: AnchorConfig | None = None,
    scale: float | None = None,
    mask: Mask | str = "causal",
    cu_seqlens: Any = None,
    kv_cu_seqlens: Any = None,
    keep: Any = None,
    plan: Any = None,
    kernel: str = "auto",
    reports: bool = False,
) -> Call:
    check(q, k, v, scale, spread=True)
    cuts = _layouts(runtime, layout, kv_layout, q, k)
    if plan is not None:
        raise ValueError("got plan= and group=; over ranks columns are found by the call: leave plan out")
    config = configuration(config)
    config.thetas(q.shape[2])
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    documents = documents_of(cuts[0].total, cuts[1].total, *packed(mask, cu_seqlens, kv_cu_seqlens))
    longest = max((b - a for _, (a, b) in documents), default=0)
    geometry = geometry_of(documents, *cost.resolved(config, longest))
    rows = kept_rows(keep, k.new_empty(()).expand(1, cuts[1].total))
    found = cut_of(geometry, *cuts, () if rows is None else tuple(rows.tolist()))
    executor(kernel, q, v, scale)  # a name that does not fit is refused before anything is sent
    stats = RankStats(ring_bytes=(k.numel() + v.numel()) * k.element_size() * (runtime.world - 1))
    _choose_path(stats, config, geometry, q, v)
    agreed = (config, scale, documents, found.keep, str(test_dtype(q, config.scores)), reports)
    return Call(runtime, found, config, scale, kernel, stats, agreed, reports)


def _layouts(
    runtime: Transport, layout: Layout | str, kv_layout: Layout | str | None, q: Tensor, k: Tensor
) -> tuple[Layout, Layout]:
    """Layouts of queries and keys, both from position 0."""
    rows = Layout.of(layout, q.shape[1], runtime.world)
    keys = rows if kv_layout is None else Layout.of(kv_layout, k.shape[1], runtime.world)
    for x, what, cut in ((q, "queries", rows), (k, "keys", keys)):
        there = cut.length(runtime.rank) if runtime.rank < cut.world else 0
        if cut.world != runtime.world or there != x.shape[1]:
            raise ValueError(
                f"rank {runtime.rank} of {runtime.world} got {x.shape[1]} {what}; their layout has {cut.world} ranks and gives it "
                f"{there}: give the Layout that cut the sequence, and kv_layout= where keys are cut differently"
            )
    before = keys.total - rows.total
    if before < 0 or (kv_layout is not None and rows.offset - keys.offset not in (0, before)):
        raise ValueError(
            f"layout has positions {rows.offset} to {rows.offset + rows.total}, kv_layout {keys.offset} to "
            f"{keys.offset + keys.total}; queries are the last rows of the keys' sequence, so both must end at one position "
            "(or give a layout with offset 0)"
        )
    return rows.at(0), rows.at(0) if kv_layout is None else neighbouring(keys)


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
    cut, (batch, _, heads, dim) = call.cut, q.shape
    queries, keys = ([0, *(stop[1] for stop in side)] for side in zip(*cut.geometry.documents))
    mask = Mask.causal() if len(queries) < 3 else Mask.documents(queries, keys)
    shape = AttentionShape(batch, queries[-1], keys[-1], heads, k.shape[2], dim, v.shape[3], q.dtype)
    same = None if cut.layout == cut.kv_layout else cut.kv_layout
    chosen = plan(world=cut.world, shape=shape, layout=cut.layout, kv_layout=same, mask=mask)
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

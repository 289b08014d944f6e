"""The calls users make: `attention` and `plan`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenring import executor, kernels
from tokenring.agreement import agree, refuse
from tokenring.arguments import check_given, check_mask, check_options, check_tensors
from tokenring.choose import check_name, choose_plan
from tokenring.layout import Layout
from tokenring.mask import Mask
from tokenring.merge import accumulator_dtype, merge_sinks_
from tokenring.plan import Plan
from tokenring.problem import Problem
from tokenring.shape import AttentionShape
from tokenring.transport import Transport, connect
from tokenring.work import BackwardWork, ForwardWork, Options


def plan(
    schedule: str = "auto",
    *,
    world: int,
    shape: AttentionShape,
    layout: Layout | str,
    kv_layout: Layout | str | None = None,
    mask: Mask | str = "causal",
    direction: str = "forward",
    partial_dtype: torch.dtype | None = None,
) -> Plan:
    """The plan of a schedule: what every rank sends, computes and merges, before anything runs.

    Args:
        schedule: "ring", "biring", "tokenring", "gather", or "auto" (see `tokenring.choose`).
        world: how many ranks.
        shape: the global shape of the call.
        layout: a Layout, or a name for `shape.q_length` positions.
        kv_layout: where keys and values are cut differently from queries. With the query layout's offset left at 0, causal
            and window masks then align bottom-right: query offset = kv length - query length.
        mask: "causal", "full" or a Mask.
        direction: "forward", or "backward": the schedules are then "ring:direct", "biring", "tokenring", "gather" or "auto".
        partial_dtype: dtype in which partial gradients travel home; the input's where not given.

    >>> shape = AttentionShape(batch=1, q_length=8, kv_length=8, q_heads=2, kv_heads=1, head_dim=4, dtype=torch.float32)
    >>> plan("ring", world=2, shape=shape, layout="contiguous", mask="full").bytes_sent(0)
    128
    """
    if direction not in ("forward", "backward"):
        raise ValueError(f'direction is {direction!r}; give "forward" or "backward"')
    q_layout = _named(layout, shape.q_length, world)
    k_layout = q_layout if kv_layout is None else _named(kv_layout, shape.kv_length, world)
    for what, cut, length in (("layout", q_layout, shape.q_length), ("kv_layout", k_layout, shape.kv_length)):
        if cut.total != length or cut.world != world:
            raise ValueError(
                f"{what} cuts {cut.total} positions over {cut.world} ranks; the shape has {length} over {world} ranks"
            )
    problem = _problem(q_layout, k_layout, kv_layout is not None, Mask.of(mask), shape, direction)
    return choose_plan(schedule, problem, shape, partial_dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    layout: Layout | str = "zigzag",
    kv_layout: Layout | str | None = None,
    mask: Mask | str = "causal",
    schedule: str = "auto",
    backward_schedule: str = "auto",
    partial_dtype: torch.dtype | None = None,
    plan: Plan | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a sequence that is spread over the ranks of a group.

        out = softmax(scale * q k^T + mask) v,   lse = log sum exp(scale * q k^T + mask)

    Args:
        q: (B, Sq_local, Hq, D), this rank's queries in the order of `layout.positions(rank)`.
        k: (B, Skv_local, Hkv, D), v: (B, Skv_local, Hkv, Dv); Hq a multiple of Hkv, never expanded on the wire.
        group: ProcessGroup, 1-D DeviceMesh, LocalGroup, or None for one rank.
        layout: a Layout, or a name where every rank holds equally many rows.
        kv_layout: where keys and values are cut differently from queries (then see `tokenring.plan` for the alignment).
        mask: "causal", "full" or a Mask.
        schedule: "auto", "ring", "biring", "tokenring" or "gather".
        plan: layout, mask and schedule in one: one plan serves every layer of a batch. Leave the others at their defaults.
        backward_schedule: "auto", "ring:direct", "biring", "tokenring" or "gather", whatever the forward schedule is.
        partial_dtype: dtype in which partial gradients travel to their owner, who adds them in float32 (float64 for
            float64); the input's where not given.
        scale: 1 / sqrt(D) where not given.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: (Hq,), the logit of one virtual key of value 0 per head.
        kernel: "auto", "cpu_flash" or "reference".
        return_lse: also return lse.

    Returns:
        out (B, Sq_local, Hq, Dv) in q's dtype; with `return_lse` also lse (B, Hq, Sq_local), float32 (float64 for
        float64), natural log, the sink included. A row that may attend to nothing gives zeros and lse = -inf.

    Differentiable in q, k, v and sinks; the gradient of `sinks` is this rank's share, to be summed over the group. lse is not.

    Raises:
        ValueError: for arguments that do not fit, before any payload is sent; AgreementError on the other ranks, and on
            all where ranks disagree (see `tokenring.agreement`).
        TransportError: a transfer failed or timed out.

    >>> q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
    >>> attention(q, k, v).shape
    torch.Size([1, 6, 4, 8])
    """
    runtime = connect(group)
    prepared = isinstance(plan, Plan) and plan in runtime.prepared
    try:
        check_tensors(q, k, v)
        check_options(q, sinks, scale, softcap)
        if plan is None:
            plan = _plan_for(q, k, v, runtime, layout, kv_layout, mask, schedule)
        else:
            check_given(plan, q, k, layout, kv_layout, mask, schedule)
        _check_plan(plan, q, k, v, runtime)
        if plan.problem.backward:
            raise ValueError('plan is a backward plan; give one made with direction="forward"')
        check_name(backward_schedule, runtime.world, backward=True)
        chosen = kernels.choose(kernel, q, v, softcap)
    except ValueError as error:
        if not prepared:
            refuse(runtime, error)
        raise
    if not prepared:
        agree(runtime, plan, (scale, softcap, sinks is None, backward_schedule, partial_dtype))
    options = Options(chosen, 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale), softcap)
    out, lse = _Attention.apply(q, k, v, sinks, plan, (backward_schedule, partial_dtype), runtime, options)
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        plan: Plan,
        backward: tuple[str, torch.dtype | None],
        runtime: Transport,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = executor.run(plan, runtime, ForwardWork(q, k, v, options))
        if sinks is not None:
            out = out.to(accumulator_dtype(q.dtype))
            merge_sinks_(out, lse, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.forward_plan, ctx.chosen, ctx.runtime, ctx.options = plan, backward, runtime, options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        schedule, partial_dtype = ctx.chosen
        problem = replace(ctx.forward_plan.problem, direction="backward")
        plan = choose_plan(schedule, problem, ctx.forward_plan.shape, partial_dtype)
        wide = accumulator_dtype(q.dtype)
        delta = (do.to(wide) * out.to(wide)).sum(-1).transpose(1, 2).contiguous()
        work = BackwardWork((q, do.contiguous(), lse.contiguous(), delta), k, v, ctx.options, plan.partial_dtype)
        dq, dk, dv = executor.run(plan, ctx.runtime, work)
        d_sinks = None
        if sinks is not None:
            share = torch.exp(sinks.to(wide)[None, :, None] - lse).masked_fill(torch.isneginf(lse), 0.0)
            d_sinks = -(share * delta).sum(dim=(0, 2)).to(sinks.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_sinks, None, None, None, None


def _named(layout: Layout | str, length: int, world: int) -> Layout:
    if world < 1:
        raise ValueError(f"world is {world}; a plan needs 1 rank or more")
    if isinstance(layout, Layout):
        return layout
    if length % world:
        raise ValueError(
            f"layout is the name {layout!r}, which needs equal shards, but {length} rows over {world} ranks are not; give a Layout"
        )
    return Layout.of(layout, length // world, world)


def _problem(
    q_layout: Layout, k_layout: Layout, align: bool, mask: Mask, shape: AttentionShape, direction: str = "forward"
) -> Problem:
    if align and not q_layout.offset and not mask.limits.packed and mask != Mask.full():
        offset = k_layout.offset + k_layout.total - q_layout.total
        if offset < 0:
            raise ValueError(
                f"{q_layout.total} queries are more than {k_layout.total} keys, and cannot align bottom-right; "
                "give the query layout an offset"
            )
        q_layout = q_layout.at(offset)
    check_mask(mask, q_layout, k_layout, shape.batch)
    return Problem(q_layout.world, q_layout, k_layout, mask, direction, shape.q_heads, shape.kv_heads)


def _plan_for(
    q: Tensor, k: Tensor, v: Tensor, runtime: Transport, layout: Any, kv_layout: Any, mask: Mask | str, schedule: str
) -> Plan:
    world = runtime.world
    q_layout = Layout.of(layout, q.shape[1], world)
    k_layout = q_layout if kv_layout is None else Layout.of(kv_layout, k.shape[1], world)
    for what, cut, rows in (("layout", q_layout, q.shape[1]), ("kv_layout", k_layout, k.shape[1])):
        if cut.world != world or cut.length(runtime.rank) != rows:
            there = cut.length(runtime.rank) if runtime.rank < cut.world else 0
            raise ValueError(
                f"rank {runtime.rank} of {world} got {rows} rows; its {what} has {cut.world} ranks and gives it {there} rows"
                + (
                    "; give kv_layout where keys are cut differently"
                    if what == "kv_layout" and kv_layout is None
                    else ""
                )
            )
    shape = AttentionShape(
        q.shape[0], q_layout.total, k_layout.total, q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype
    )
    problem = _problem(q_layout, k_layout, kv_layout is not None, Mask.of(mask), shape)
    return choose_plan(schedule, problem, shape)


def _check_plan(plan: Plan, q: Tensor, k: Tensor, v: Tensor, runtime: Transport) -> None:
    s, p = plan.shape, plan.problem
    if p.world != runtime.world:
        raise ValueError(
            f"the plan is for {p.world} ranks and the group has {runtime.world}; build the plan with world={runtime.world}"
        )
    v_dim = s.head_dim if s.v_head_dim is None else s.v_head_dim
    planned = (
        (s.batch, p.q_layout.length(runtime.rank), s.q_heads, s.head_dim),
        (s.batch, p.kv_layout.length(runtime.rank), s.kv_heads, s.head_dim),
        (s.batch, p.kv_layout.length(runtime.rank), s.kv_heads, v_dim),
    )
    given = (tuple(q.shape), tuple(k.shape), tuple(v.shape))
    if planned != given or s.dtype != q.dtype:
        raise ValueError(
            f"the plan gives rank {runtime.rank} q, k, v of {planned} {s.dtype}, got {given} {q.dtype}; build the plan for these shapes"
        )

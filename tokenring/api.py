"""The call users make: `attention`, and its gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenring import executor, kernels
from tokenring.agreement import agree, refuse
from tokenring.arguments import check_given, check_options, check_tensors, wire_dtype
from tokenring.choose import check_name, choose_plan
from tokenring.layout import Layout
from tokenring.mask import Mask
from tokenring.merge import accumulator_dtype, merge_sinks_
from tokenring.plan import Plan
from tokenring.planning import plan_for
from tokenring.transport import Transport, connect
from tokenring.work import BackwardWork, ForwardWork, Options

if TYPE_CHECKING:
    from tokenring.topology import Topology


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
    partial_dtype: str | torch.dtype | None = None,
    topology: Topology | None = None,
    plan: Plan | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
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
        schedule: "auto" or a schedule's name (see `tokenring.plan`).
        plan: layout, mask and schedule in one: one plan serves every layer of a batch. Leave the others at their defaults.
        backward_schedule: "auto" or a name, whatever the forward schedule is.
        partial_dtype: "input" (default), "float32" or a dtype: in which partial gradients travel straight to their owner, who
            adds them in float32 (float64 for float64).
        topology: the links, for "auto"; where not given it counts bytes.
        scale: 1 / sqrt(D) where not given.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: (Hq,), the logit of one virtual key of value 0 per head.
        dropout: 0; anything above is refused, because no two schedules would drop the same weights.
        kernel: "auto", or the name of one (see `tokenring.kernels`); `tokenring.trace` says which ran.
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
        check_options(q, sinks, scale, softcap, dropout)
        partial = wire_dtype(partial_dtype)
        if plan is None:
            plan = plan_for(q, k, v, runtime, layout, kv_layout, mask, schedule, topology)
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
    backward = Backward(backward_schedule, partial, topology)
    if not prepared:
        agree(runtime, plan, (scale, softcap, sinks is None, backward))
    options = Options(chosen, 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale), softcap)
    out, lse = _Attention.apply(q, k, v, sinks, plan, backward, runtime, options)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class Backward:
    """How gradients will be computed: decided when one is asked for."""

    schedule: str
    partial_dtype: torch.dtype | None
    topology: Topology | None

    def plan(self, forward: Plan) -> Plan:
        """The backward plan beside a forward one."""
        problem = replace(forward.problem, direction="backward")
        return choose_plan(self.schedule, problem, forward.shape, self.partial_dtype, self.topology)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        plan: Plan,
        backward: Backward,
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
        plan = ctx.chosen.plan(ctx.forward_plan)
        wide = accumulator_dtype(q.dtype)
        delta = (do.to(wide) * out.to(wide)).sum(-1).transpose(1, 2).contiguous()
        work = BackwardWork((q, do.contiguous(), lse.contiguous(), delta), k, v, ctx.options, plan.partial_dtype)
        dq, dk, dv = executor.run(plan, ctx.runtime, work)
        d_sinks = None
        if sinks is not None:
            share = torch.exp(sinks.to(wide)[None, :, None] - lse).masked_fill(torch.isneginf(lse), 0.0)
            d_sinks = -(share * delta).sum(dim=(0, 2)).to(sinks.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_sinks, None, None, None, None


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

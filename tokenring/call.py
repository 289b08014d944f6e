"""One attention call on one rank: what was asked, the plans that answer it, and both directions run.

Eager, compiled and recomputed calls all end here.

    forward     q, k, v -> out, lse        the softmax over the keys of all ranks, the sink merged last
    backward    delta = rowsum(do * out),  d_sinks = -sum over rows of exp(sinks - lse) * delta
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tokenring import executor, kernels
from tokenring.agreement import agree, agree_backward, refuse
from tokenring.arguments import check_given, check_options, check_tensors, wire_dtype
from tokenring.choose import check_name, choose_plan
from tokenring.layout import Layout
from tokenring.mask import Mask
from tokenring.merge import accumulator_dtype, merge_sinks_
from tokenring.planning import plan_for
from tokenring.plans.plan import Plan
from tokenring.plans.spec import plan_of_tensor
from tokenring.transport import Transport
from tokenring.work import BackwardWork, ForwardWork, Options

if TYPE_CHECKING:
    from tokenring.topology import Topology


class Call(NamedTuple):
    """What a call asks for beside its tensors and its group, as `attention` was given it."""

    layout: Layout | str = "zigzag"
    kv_layout: Layout | str | None = None
    mask: Mask | str = "causal"
    schedule: str = "auto"
    backward_schedule: str = "auto"
    partial_dtype: str | torch.dtype | None = None
    topology: Topology | None = None
    plan: Plan | Tensor | None = None
    dropout: float = 0.0
    kernel: str = "auto"
    scale: float | None = None
    softcap: float | None = None

    def __hash__(self) -> int:
        """Of what is cheap to hash and tells calls apart: every layer of a model looks its plans up."""
        problem = self.plan.problem if isinstance(self.plan, Plan) else None
        planned = problem and (self.plan.schedule, problem.mask, problem.q_layout)
        return hash((self.layout, self.kv_layout, self.mask, self.schedule, self.backward_schedule, planned))


@dataclass(frozen=True, slots=True)
class Backward:
    """How gradients will be computed: decided when one is asked for."""

    schedule: str
    partial_dtype: torch.dtype | None
    topology: Topology | None


@dataclass(frozen=True)
class Ready:
    """A call whose arguments were found good: what both directions run."""

    plan: Plan
    gradients: Backward
    options: Options

    @cached_property
    def backward_plan(self) -> Plan:
        """Made when a gradient is asked for."""
        problem, chosen = replace(self.plan.problem, direction="backward"), self.gradients
        return choose_plan(chosen.schedule, problem, self.plan.shape, chosen.partial_dtype, chosen.topology)


Like = tuple[torch.Size, torch.dtype, torch.device]


def forward(
    call: Call, runtime: Transport, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Ready, int]:
    """out in q's dtype and lse, both new; what `backward` wants, and the number of this call.

    Collective: a refusal here is told to the other ranks before it is raised.
    """
    prepared = False
    try:
        call = _unpacked(call)
        prepared = bool(runtime.prepared) and isinstance(call.plan, Plan) and call.plan in runtime.prepared
        ready = make_ready(call, runtime, q, k, v, sinks)
    except ValueError as error:
        refuse(runtime, error, prepared)
        raise
    number = 0
    if not prepared:
        number = agree(runtime, ready.plan, (call.scale, call.softcap, sinks is None, ready.gradients))
    out, lse = executor.run(ready.plan, runtime, ForwardWork(q, k, v, ready.options))
    if sinks is not None:
        out = out.to(accumulator_dtype(q.dtype))
        merge_sinks_(out, lse, sinks)
    return out.to(q.dtype), lse, ready, number


def backward(
    ready: Ready,
    number: int,
    runtime: Transport,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and this rank's share of d_sinks. Collective. number: that of the forward call, 0 where it is not known."""
    plan = ready.backward_plan
    wide = accumulator_dtype(q.dtype)
    with runtime.shared_fate():
        agree_backward(runtime, plan, ready.plan, number)
        delta = (do.to(wide) * out.to(wide)).sum(-1).transpose(1, 2).contiguous()
        queries = (q, do.contiguous(), lse.contiguous(), delta, out)
        dq, dk, dv = executor.run(plan, runtime, BackwardWork(queries, k, v, ready.options, plan.partial_dtype))
    d_sinks = None
    if sinks is not None:
        share = torch.exp(sinks.to(wide)[None, :, None] - lse).masked_fill(torch.isneginf(lse), 0.0)
        d_sinks = -(share * delta).sum(dim=(0, 2)).to(sinks.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_sinks


def make_ready(call: Call, runtime: Transport, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Ready:
    """The plans of a call, or ValueError for arguments that do not fit this rank's tensors."""
    call = _unpacked(call)
    asked = call, runtime.world, runtime.rank, tuple((x.shape, x.dtype, x.device) for x in (q, k, v))
    try:
        ready = _ready(*asked)
    except TypeError:  # an argument that cannot be hashed is of a wrong type, which the checks inside name
        ready = _ready.__wrapped__(*asked)
    check_options(q, sinks, call.scale, call.softcap, call.dropout)
    return ready


def _unpacked(call: Call) -> Call:
    return call._replace(plan=plan_of_tensor(call.plan)) if isinstance(call.plan, Tensor) else call


@lru_cache(maxsize=256)
def _ready(call: Call, world: int, rank: int, tensors: tuple[Like, ...]) -> Ready:
    """Found once for calls that are alike, such as those of a model's layers."""
    q, k, v = (torch.empty((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in tensors)
    check_tensors(q, k, v)
    check_options(q, None, call.scale, call.softcap, call.dropout)
    partial, plan = wire_dtype(call.partial_dtype), call.plan
    if plan is None:
        place = SimpleNamespace(world=world, rank=rank)
        plan = plan_for(q, k, v, place, call.layout, call.kv_layout, call.mask, call.schedule, call.topology)
    else:
        check_given(plan, q, k, call.layout, call.kv_layout, call.mask, call.schedule)
    _check_plan(plan, q, k, v, world, rank)
    check_name(call.backward_schedule, world, backward=True)
    scale = 1 / math.sqrt(q.shape[-1]) if call.scale is None else float(call.scale)
    options = Options(kernels.choose(call.kernel, q, v, call.softcap), scale, call.softcap)
    return Ready(plan, Backward(call.backward_schedule, partial, call.topology), options)


def _check_plan(plan: Plan, q: Tensor, k: Tensor, v: Tensor, world: int, rank: int) -> None:
    s, p = plan.shape, plan.problem
    if p.world != world:
        raise ValueError(
            f"the plan is for {p.world} ranks and the group has {world}; build the plan with world={world}"
        )
    v_dim = s.head_dim if s.v_head_dim is None else s.v_head_dim
    planned = (
        (s.batch, p.q_layout.length(rank), s.q_heads, s.head_dim),
        (s.batch, p.kv_layout.length(rank), s.kv_heads, s.head_dim),
        (s.batch, p.kv_layout.length(rank), s.kv_heads, v_dim),
    )
    given = (tuple(q.shape), tuple(k.shape), tuple(v.shape))
    if planned != given or s.dtype != q.dtype:
        raise ValueError(
            f"the plan gives rank {rank} q, k, v of {planned} {s.dtype}, got {given} {q.dtype}; build the plan for these shapes"
        )
    if p.backward:
        raise ValueError('plan is a backward plan; give one made with direction="forward"')

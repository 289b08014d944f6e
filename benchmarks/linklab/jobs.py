"""What the crew does: a common start, then one timed call. Every rank's clock is the machine's own, so times compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import tokenring as tr

Span = tuple[float, float]
"""Common start and this rank's end."""

SETTLE_SECONDS = 0.05
"""From the agreement on a start to the start: what is still under way arrives, token buckets fill."""


def together(call: Callable[[], Any]) -> Span:
    """Run `call` at the same moment on every rank; when it started and ended, in seconds of the machine's clock."""
    start = torch.tensor([time.perf_counter() + SETTLE_SECONDS], dtype=torch.float64)
    dist.all_reduce(start, op=dist.ReduceOp.MAX)
    time.sleep(max(0.0, float(start) - time.perf_counter()))
    call()
    return float(start), time.perf_counter()


def turns(repeat: int, calls: list[Callable[[], Any]]) -> list[list[Span]]:
    """`repeat` rounds of all calls in turn, so that a drift of the machine falls on all of them; the spans of each call."""
    times: list[list[Span]] = [[] for _ in calls]
    for _ in range(repeat):
        for call, spans in zip(calls, times):
            spans.append(together(call))
    return times


def seconds(answers: list[list[Span]]) -> list[float]:
    """From what the ranks gave for one call: the common start to the end of the slowest rank, for each round.

    >>> seconds([[(1.0, 1.5), (2.0, 2.5)], [(1.0, 1.75), (2.0, 2.25)]])
    [0.75, 0.5]
    """
    return [max(end for _, end in spans) - spans[0][0] for spans in zip(*answers)]


def inputs(rank: int, plan: tr.Plan) -> list[torch.Tensor]:
    """This rank's q, k, v and the gradient of its out: random, different on every rank."""
    shape, problem = plan.shape, plan.problem
    make = torch.Generator().manual_seed(rank)
    v_dim = shape.head_dim if shape.v_head_dim is None else shape.v_head_dim
    queries, keys = problem.q_layout.length(rank), problem.kv_layout.length(rank)
    sizes = (
        (queries, shape.q_heads, shape.head_dim),
        (keys, shape.kv_heads, shape.head_dim),
        (keys, shape.kv_heads, v_dim),
        (queries, shape.q_heads, v_dim),
    )
    return [torch.randn(shape.batch, *size, generator=make).to(shape.dtype) for size in sizes]


def forward(rank: int, world: int, plans: list[tr.Plan], repeat: int) -> list[list[Span]]:
    """Per plan, `repeat` timed forward calls; the plans take turns. One call each goes before, and its traffic is checked."""
    q, k, v, _ = inputs(rank, plans[0])
    group = dist.group.WORLD
    for plan in plans:
        tr.prepare(group, plan)
        with tr.count_traffic(group) as traffic:
            tr.attention(q, k, v, group=group, plan=plan)
        _expect(plan, rank, traffic)
    return turns(repeat, [lambda plan=plan: tr.attention(q, k, v, group=group, plan=plan) for plan in plans])


def backward(rank: int, world: int, plans: list[tr.Plan], repeat: int) -> list[list[Span]]:
    """Per backward plan, `repeat` timed gradients; their forward, by the gather schedule, is outside the clock."""
    *tensors, gradient = inputs(rank, plans[0])
    for tensor in tensors:
        tensor.requires_grad_()
    group, first = dist.group.WORLD, plans[0]
    problem = first.problem
    there = tr.plan(
        "gather",
        world=world,
        shape=first.shape,
        layout=problem.q_layout,
        kv_layout=problem.kv_layout,
        mask=problem.mask,
    )
    outs = [
        tr.attention(
            *tensors, group=group, plan=there, backward_schedule=plan.schedule, partial_dtype=plan.partial_dtype
        )
        for plan in plans
    ]
    calls = [lambda out=out: torch.autograd.grad(out, tensors, gradient, retain_graph=True) for out in outs]
    for plan, call in zip(plans, calls):
        with tr.count_traffic(group) as traffic:
            call()
        _expect(plan, rank, traffic)
    return turns(repeat, calls)


def compute(rank: int, world: int, plan: tr.Plan, repeat: int) -> list[Span]:
    """All ranks at once, each alone with its queries and as many keys as the whole sequence has: no transfers."""
    q, k, v, gradient = inputs(rank, plan)
    leaves = [x.requires_grad_(plan.problem.backward) for x in (q, *(x.repeat(1, world, 1, 1) for x in (k, v)))]
    attend = partial(tr.attention, *leaves, mask="full", layout="contiguous", kv_layout="contiguous")
    if not plan.problem.backward:
        return turns(repeat, [attend])[0]
    return turns(repeat, [partial(torch.autograd.grad, attend(), leaves, gradient, retain_graph=True)])[0]


def _expect(plan: tr.Plan, rank: int, traffic: tr.Traffic) -> None:
    planned = plan.bytes_sent(rank)
    sent = sum(traffic.sent.values())
    if sent != planned:
        raise AssertionError(f"{plan.schedule}: rank {rank} sent {sent} bytes, the plan says {planned}")

"""Faults: at one chosen moment of one rank something goes wrong, and every rank tells what became of it.

Moment 0 is before the call's header; then each open, push, wait, compute, sum and merge of the rank's program, in order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

import tokenring as tr
from tests.oracle import dense_attention, random_qkv
from tokenring import executor, kernels
from tokenring.agreement import agree
from tokenring.plans.plan import Plan
from tokenring.transport import Message, Transport
from tokenring.work import BackwardWork, ForwardWork, Options, Work

LENGTH, Q_HEADS, KV_HEADS, DIM = 12, 4, 4, 4
VERBS = ("open", "push", "wait")
WORKS = ("compute", "sum", "merge")
EXIT_CODE = 17
BOUND_SECONDS = 20.0
"""How long a fault may take to be known everywhere, on a loaded machine; time-outs of calls that must not time out are longer."""


class Injected(Exception):
    """What a faulty rank raises."""


@dataclass(frozen=True)
class Case:
    """A small plan."""

    world: int
    schedule: str
    backward: bool = False

    @property
    def plan(self) -> Plan:
        return _plan(self)

    def moments(self, rank: int) -> list[str]:
        """What each moment of a rank is."""
        verbs = [f"{op.verb} {op.step}/{op.lane}" for op in self.plan.operations(rank) if op.verb in (*VERBS, *WORKS)]
        return ["header", *verbs]

    def sends_after(self, rank: int, moment: int) -> bool:
        """Whether another rank waits for something that this one sends at that moment or later."""
        verbs = [op for op in self.plan.operations(rank) if op.verb in (*VERBS, *WORKS)][max(0, moment - 1) :]
        steps = self.plan.steps(rank)
        return moment == 0 or any(op.verb == "push" and steps[op.step].sends[op.lane] for op in verbs)


@lru_cache
def _plan(case: Case) -> Plan:
    shape = tr.AttentionShape(1, LENGTH, LENGTH, Q_HEADS, KV_HEADS, DIM, dtype=torch.float64)
    layout = tr.Layout.zigzag(LENGTH, case.world)
    direction = "backward" if case.backward else "forward"
    return tr.plan(case.schedule, world=case.world, shape=shape, layout=layout, mask="causal", direction=direction)


CASES = [
    *(Case(2, name) for name in ("ring", "tokenring", "gather")),
    *(Case(3, name) for name in ("ring", "biring", "tokenring")),
    *(Case(4, name) for name in ("mesh:2x2", "usp:2x2", "ulysses", "hybrid:ring/tokenring@2")),
    *(Case(2, name, backward=True) for name in ("tokenring", "gather")),
    *(Case(3, name, backward=True) for name in ("ring", "ring:direct", "tokenring")),
    *(Case(4, name, backward=True) for name in ("mesh:2x2", "usp:2x2", "hybrid:tokenring/ring@2")),
]


@dataclass(frozen=True)
class Fault:
    """act: "raise", "delay" (for `seconds`), "end" (the process), "more" or "fewer" (rows in the next message it sends)."""

    rank: int
    moment: int
    act: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What became of a call on one rank, and of the one after it on the same transport."""

    kind: str
    error: str
    seconds: float
    right: bool
    later: str


class Faulty:
    """A transport or a work, in front of which a fault happens."""

    def __init__(self, inner: Any, meet: Callable[[], None], verbs: tuple[str, ...]) -> None:
        self.inner, self.meet, self.verbs = inner, meet, verbs

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name not in self.verbs:
            return found

        def verb(*given: Any) -> Any:
            resize = self.meet()
            return found(*(_resized(given, resize) if resize and name == "push" else given))

        return verb


class Clock:
    """Counts a rank's moments, and acts at the one of the fault."""

    def __init__(self, fault: Fault | None, rank: int) -> None:
        self.fault, self.at = fault if fault and fault.rank == rank else None, -1

    def meet(self) -> str | None:
        """ "more" or "fewer" where the message of this moment is to change."""
        self.at += 1
        fault = self.fault
        if fault is None or self.at != fault.moment:
            return None
        if fault.act == "raise":
            raise Injected("broken on purpose")
        if fault.act == "end":
            os._exit(EXIT_CODE)
        time.sleep(fault.seconds)
        return fault.act if fault.act in ("more", "fewer") else None


def _resized(given: tuple, how: str) -> tuple[int, int, list[Message]]:
    lane, step, sends = given
    (peer, tensor), *others = sends
    flat = tensor.flatten()
    return lane, step, [(peer, torch.cat([flat, flat]) if how == "more" else flat[:-1].contiguous()), *others]


def attempt(transport: Transport, case: Case, fault: Fault | None) -> Outcome:
    """One call with a fault in it, and one after it without."""
    start, kind, error, right = time.monotonic(), "", "", False
    try:
        right = _run(transport, case, fault)
    except Exception as raised:
        kind, error = type(raised).__name__, str(raised)
    seconds, later = time.monotonic() - start, ""
    try:
        assert _run(transport, case, None)
    except Exception as raised:
        later = f"{type(raised).__name__}: {raised}"
    return Outcome(kind, error, seconds, right, later)


def _run(transport: Transport, case: Case, fault: Fault | None) -> bool:
    """Whether the result is that of dense attention."""
    clock, rank, plan = Clock(fault, transport.rank), transport.rank, case.plan
    with transport.shared_fate():
        clock.meet()
        agree(transport, plan, ())
        work = Faulty(_work(case, rank), clock.meet, WORKS)
        got = executor.run(plan, Faulty(transport, clock.meet, VERBS), work)
    wanted = [cut.contiguous() for cut in _shards(case.world, rank)[4 if case.backward else 2]]
    return all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(got, wanted, strict=True))


def _work(case: Case, rank: int) -> Work:
    qkv, grad, (_, lse), delta, _ = _shards(case.world, rank)
    options = Options(kernels.choose("reference", *qkv[::2], None), DIM**-0.5, None)
    if not case.backward:
        return ForwardWork(*qkv, options)
    return BackwardWork((qkv[0], grad, lse, delta), *qkv[1:], options, None)


@lru_cache
def _dense() -> tuple:
    """q, k, v; the gradient of out; out and lse; delta; dq, dk and dv: of the whole sequence."""
    leaves = [x.requires_grad_() for x in random_qkv(1, LENGTH, Q_HEADS, KV_HEADS, DIM, torch.float64)]
    grad = random_qkv(1, LENGTH, Q_HEADS, 1, DIM, torch.float64, seed=5)[0]
    positions = torch.arange(LENGTH)
    out, lse = dense_attention(*leaves, tr.Mask.causal().dense(positions, positions))
    gradients = torch.autograd.grad(out, leaves, grad)
    delta = (grad * out).sum(-1).transpose(1, 2)
    return [x.detach() for x in leaves], grad, (out.detach(), lse.detach()), delta.detach(), gradients


def _shards(world: int, rank: int) -> tuple:
    layout = tr.Layout.zigzag(LENGTH, world)
    qkv, grad, (out, lse), delta, gradients = _dense()
    rows = [[layout.shard(x, rank).contiguous() for x in each] for each in (qkv, [grad, out], gradients)]
    columns = [layout.shard(x, rank, 2).contiguous() for x in (lse, delta)]
    return rows[0], rows[1][0], (rows[1][1], columns[0]), columns[1], rows[2]

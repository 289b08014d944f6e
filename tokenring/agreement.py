"""Do all ranks mean the same call? One small fixed header to every rank, judged before any payload is posted.

    header    int64 (16,): status, version, call number, direction, number of the forward call, a digest of each part
              then 376 bytes of text: why a rank refuses its own arguments

A rank whose own arguments are wrong sends a header that says so, and every rank raises; ranks that disagree on shape, mask,
layout, schedule or an option raise too, naming the part. Nothing else has been sent by then, so the group stays usable. A
backward pass has a header as well, which says of which forward call it is. A plan that `prepare` agreed on once needs none.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

from tokenring.plans.plan import Plan
from tokenring.transport import HEADER_BYTES, Transport, TransportError, connect

VERSION = 2
PREPARED_PLANS = 4096
"""How many plans a group remembers having agreed on; one that is forgotten has headers again."""
PARTS = (
    "library version",
    "number of calls made",
    "direction",
    "which forward call this is the backward of",
    "shape or dtype",
    "layout",
    "kv_layout",
    "mask",
    "schedule",
    "scale, softcap, sinks or backward",
)
_HEAD = struct.Struct("16q")
_DIRECTION, _FORWARD_CALL = 3, 4
"""Parts up to here are numbers that mean something to a reader; later ones are digests."""


class AgreementError(ValueError):
    """Ranks called with different arguments, or one of them refused its own. Nothing was computed; the group is usable."""


def agree(runtime: Transport, plan: Plan, options: Sequence[Any], *, forward_call: int = 0) -> int:
    """Raise AgreementError on every rank unless all ranks make this call: here, or when the call first waits. Collective.

    Args:
        plan: forward or backward.
        options: what else must be alike on all ranks; hashable, with a repr that says all.
        forward_call: for a backward plan, what `agree` returned for its forward call; 0 where nobody knows any more.

    Returns:
        The number of this call.
    """
    if runtime.world == 1:
        return 0
    runtime.calls += 1
    head = (0, VERSION, runtime.calls, int(plan.problem.backward), forward_call, *_digests(plan, tuple(options)))
    runtime.announce(_header(head), partial(_judge, runtime.world))
    if not _waits(plan, runtime.rank):
        runtime.settle()
    return runtime.calls


def agree_backward(runtime: Transport, plan: Plan, forward_plan: Plan, forward_call: int = 0) -> None:
    """`agree` on a backward pass. Behind a prepared forward plan it is done once: the backward plan then counts as prepared."""
    if runtime.prepared and plan in runtime.prepared:
        return
    agree(runtime, plan, (), forward_call=forward_call)
    if runtime.prepared and forward_plan in runtime.prepared:
        runtime.settle()
        _keep(runtime, plan)


def refuse(runtime: Transport, error: Exception, prepared: bool = False) -> None:
    """Tell the other ranks that this one cannot make the call, so that they need not wait for it.

    They raise AgreementError and the group stays usable. On a prepared plan they listen to no header and have begun: there
    the group is given up, and they raise TransportError at once.
    """
    if runtime.world == 1 or runtime.poison is not None:
        return
    if prepared:
        runtime.abandon(error)
        return
    runtime.calls += 1
    try:
        runtime.announce(_header((1, VERSION, runtime.calls), str(error)), partial(_judge, runtime.world))
        runtime.settle()
    except (AgreementError, TransportError):
        return  # the caller raises its own error, which says more


def prepare(group: Any, plan: Plan) -> None:
    """Agree on a plan once; later calls with `plan=` on this group skip the per-call header. Collective.

    Such calls send payload at once: every rank must pass the plan, and a rank that refuses its own arguments then gives up
    the group. Their backward passes have a header the first time only.

    Example: `prepare(group, plan)`, then `attention(q, k, v, group=group, plan=plan)` in every layer.
    """
    runtime = connect(group)
    if runtime.world > 1:
        agree(runtime, plan, ())
        runtime.settle()
        _keep(runtime, plan)


def _keep(runtime: Transport, plan: Plan) -> None:
    """Every rank forgets the same plan, because all have prepared the same ones in the same order."""
    runtime.prepared[plan] = None
    if len(runtime.prepared) > PREPARED_PLANS:
        del runtime.prepared[next(iter(runtime.prepared))]


def _header(head: tuple[int, ...], text: str = "") -> bytes:
    room = HEADER_BYTES - _HEAD.size
    words = head + (0,) * (_HEAD.size // 8 - len(head))
    return _HEAD.pack(*words) + text.encode()[:room].ljust(room, b"\0")


def _judge(world: int, headers: list[bytes]) -> None:
    heads = [_HEAD.unpack_from(header) for header in headers]
    for rank, (status, *_) in enumerate(heads):
        if status:
            text = headers[rank][_HEAD.size :].rstrip(b"\0").decode(errors="replace")
            raise AgreementError(f"rank {rank} of {world} refused this call: {text}")
    if all(header == headers[0] for header in headers):
        return
    for part, name in enumerate(PARTS, start=1):
        said = [(rank, head[part]) for rank, head in enumerate(heads) if part != _FORWARD_CALL or head[part]]
        odd = next(((rank, value) for rank, value in said if value != said[0][1]), None)
        if odd is not None:
            how = _difference(part, *said[0], *odd)
            raise AgreementError(f"ranks disagree on {name}: {how}; make the same call on every rank of the group")


def _difference(part: int, rank: int, value: int, odd: int, other: int) -> str:
    if part == _DIRECTION:
        passes = ("a forward pass", "a backward pass")
        return f"rank {odd} is in {passes[other]}, rank {rank} in {passes[value]}"
    if part <= _FORWARD_CALL:
        return f"rank {odd} says {other}, rank {rank} {value}"
    return f"rank {odd} differs from rank {rank}"


@lru_cache(maxsize=1024)
def _digests(plan: Plan, options: tuple[Any, ...]) -> tuple[int, ...]:
    problem = plan.problem
    parts = (plan.shape, problem.q_layout, problem.kv_layout, problem.mask, plan.schedule)
    return (*map(_digest, parts), _digest((plan.partial_dtype, *options)))


@lru_cache(maxsize=4096)
def _digest(value: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big", signed=True)


@lru_cache(maxsize=1024)
def _waits(plan: Plan, rank: int) -> bool:
    return any(operation.verb == "wait" for operation in plan.operations(rank))

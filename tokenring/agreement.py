"""Do all ranks mean the same call? One small fixed header to every rank, read before any payload is posted.

    header    int64 (16 + 48,): status, call number, a digest of each part of the call, and the message of a rank that refuses

A rank whose own arguments are wrong sends a header that says so, and every rank raises; ranks that disagree on shape, mask,
layout, schedule or an option raise too, naming the part. Nothing else has been sent by then, so the group stays usable.
A call with a plan that `prepare` agreed on once skips the header.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tokenring.plan import Plan
from tokenring.transport import Transport, TransportError, connect

VERSION = 1
PARTS = (
    "library version",
    "number of calls made",
    "shape or dtype",
    "layout",
    "kv_layout",
    "mask",
    "schedule",
    "scale, softcap, sinks or backward",
)
MESSAGE_BYTES = 384
_HEAD = 16


class AgreementError(ValueError):
    """Ranks called with different arguments, or one of them refused its own. Nothing was computed; the group is usable."""


def agree(runtime: Transport, plan: Plan, options: Sequence[Any]) -> None:
    """Raise AgreementError on every rank unless all ranks make this call. Collective."""
    if runtime.world == 1:
        return
    runtime.calls += 1
    layouts = (plan.problem.q_layout, plan.problem.kv_layout)
    digests = (_digest(plan.shape), *map(_digest, layouts), _digest(plan.problem.mask), _digest(plan.schedule))
    _exchange(runtime, [0, VERSION, runtime.calls, *digests, _digest(tuple(options))], b"")


def refuse(runtime: Transport, error: ValueError) -> None:
    """Tell the other ranks that this one cannot make the call, so that they need not wait for it."""
    if runtime.world == 1 or runtime.poison is not None:
        return
    runtime.calls += 1
    try:
        _exchange(runtime, [1, VERSION, runtime.calls], str(error).encode()[:MESSAGE_BYTES])
    except (AgreementError, TransportError):
        return  # the caller raises its own error, which says more


def prepare(group: Any, plan: Plan) -> None:
    """Agree on a plan once; later calls with `plan=` on this group skip the per-call header. Collective.

    Such calls send payload at once: every rank must pass the plan, and a rank that refuses its own arguments then leaves the
    others to their time-out.

    Example: `prepare(group, plan)`, then `attention(q, k, v, group=group, plan=plan)` in every layer.
    """
    runtime = connect(group)
    if runtime.world > 1:
        agree(runtime, plan, ())
        runtime.prepared.add(plan)


def _exchange(runtime: Transport, head: list[int], message: bytes) -> None:
    own = torch.zeros(_HEAD + MESSAGE_BYTES // 8, dtype=torch.int64)
    own[: len(head)] = torch.tensor(head, dtype=torch.int64)
    text = own[_HEAD:].view(torch.uint8)
    text[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8) if message else text[:0]
    headers = [h.cpu() for h in runtime.all_gather(own.to(runtime.device), same_shape=True, control=True)]
    refused = [rank for rank, header in enumerate(headers) if int(header[0])]
    if refused:
        raise AgreementError(f"rank {refused[0]} of {runtime.world} refused this call: {_text(headers[refused[0]])}")
    for part, name in enumerate(PARTS, start=1):
        odd = [rank for rank, header in enumerate(headers) if int(header[part]) != int(headers[0][part])]
        if odd:
            raise AgreementError(
                f"ranks disagree on {name}: rank {odd[0]} differs from rank 0; make the same call on every rank of the group"
            )


def _text(header: Tensor) -> str:
    return bytes(header[_HEAD:].view(torch.uint8).tolist()).rstrip(b"\0").decode(errors="replace")


@lru_cache(maxsize=4096)
def _digest(value: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big", signed=True)

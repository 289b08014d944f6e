"""Attention as an operator of torch, so that graphs, dispatch modes and checkpoint policies see one thing with a name.

    tokenring::attention             q, k, v, sinks, plan, group, spec, scale, softcap -> out, lse
    tokenring::attention_backward    do, q, k, v, out, lse, sinks, plan, group, spec, scale, softcap -> dq, dk, dv, d_sinks

`group` is the process group's name, empty for one rank alone; `spec` the rest of the call as JSON (`spec.py`); `plan` a plan as
a tensor. All checks and the agreement of the ranks are inside: a result that a checkpoint kept sends nothing when it is
asked for again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tokenring import call as calls
from tokenring.arguments import check_tensors
from tokenring.call import Call
from tokenring.merge import accumulator_dtype
from tokenring.plans.spec import KINDS, layout_of, mask_of, plan_of, to_text, topology_of
from tokenring.transport import Transport, connect

_OPTIONS = "Tensor? sinks, Tensor? plan, str group, str spec, float? scale, float? softcap"
# A graph captured on a GPU could not wait for the other ranks.
_TAGS = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
_DECODERS = {"layout": layout_of, "kv_layout": layout_of, "mask": mask_of, "plan": plan_of, "topology": topology_of}


@torch.library.custom_op(
    "tokenring::attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    **_TAGS,
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    plan: Tensor | None,
    group: str,
    spec: str,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The forward of one call; see the module. Use `tokenring.attention`."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse, *_ = calls.forward(_call_of(spec, plan, scale, softcap), _runtime(group), q, k, v, sinks)
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op(
    "tokenring::attention_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    **_TAGS,
)
def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    plan: Tensor | None,
    group: str,
    spec: str,
    scale: float | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of one call; that of the sinks is empty where there are none."""
    runtime = _runtime(group)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    ready = calls.make_ready(_call_of(spec, plan, scale, softcap), runtime, q, k, v, sinks)
    *grads, d_sinks = calls.backward(ready, 0, runtime, do, q, k, v, out, lse, sinks)
    dq, dk, dv = (grad.contiguous() for grad in grads)
    return dq, dk, dv, q.new_empty(0) if d_sinks is None else d_sinks


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    check_tensors(q, k, v)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulator_dtype(q.dtype))
    return q.new_empty((*q.shape[:3], v.shape[3])), lse


@attention_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    return *grads, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, group, spec, scale, softcap = inputs
    q, k, v, sinks, plan = tensors
    ctx.save_for_backward(q, k, v, *output, sinks, plan)
    ctx.named = group, spec, scale, softcap
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # a checkpoint unpacks them once
    dq, dk, dv, d_sinks = torch.ops.tokenring.attention_backward(do, *saved, *ctx.named)
    return dq, dk, dv, None if saved[5] is None else d_sinks, None, None, None, None, None


def _refuse_second(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "attention was differentiated twice; its gradient has no gradient. Leave create_graph=True out, "
        "or attend on one rank with torch.nn.functional.scaled_dot_product_attention"
    )


attention.register_autograd(_differentiate, setup_context=_keep)
attention_backward.register_autograd(_refuse_second)


def spec_text(options: Mapping[str, Any]) -> str:
    """The arguments of a call that are neither tensors nor numbers, as JSON; None left out.

    >>> spec_text({"layout": "zigzag", "mask": None, "schedule": "ring"})
    '{"layout":"zigzag","schedule":"ring"}'
    """
    given = {name: option for name, option in options.items() if option is not None}
    return joined(given, [part_text(name, option) for name, option in given.items()])


def part_text(name: str, option: Any) -> str:
    """One argument as JSON."""
    if isinstance(option, KINDS):
        return to_text(option)
    if isinstance(option, torch.dtype):
        option = str(option)
    if not isinstance(option, (str, float, int)):
        given = f"a tensor of shape {tuple(option.shape)}" if isinstance(option, Tensor) else repr(option)
        raise ValueError(f"{name} is {given}, which a graph cannot hold; give a name or a tokenring value")
    return json.dumps(option)


def joined(names: Iterable[str], parts: Iterable[str]) -> str:
    """Named parts as one JSON object."""
    return "{" + ",".join(f'"{name}":{part}' for name, part in zip(names, parts)) + "}"


@lru_cache(maxsize=1024)
def _parts_of(spec: str) -> dict[str, Any]:
    parts = {}
    for name, said in json.loads(spec).items():
        if isinstance(said, dict):
            said = _DECODERS[name](said)
        elif name == "partial_dtype" and said.startswith("torch."):
            said = getattr(torch, said.removeprefix("torch."))
        parts[name] = said
    return parts


def _call_of(spec: str, plan: Tensor | None, scale: float | None, softcap: float | None) -> Call:
    parts = _parts_of(spec)
    return Call(**(parts if plan is None else parts | {"plan": plan}), scale=scale, softcap=softcap)


def plain(*tensors: Tensor) -> bool:
    """Whether all are tensors without a class of their own that acts on operators. Refuses those that stand for shards."""
    for x in tensors:
        if type(x) not in (Tensor, torch.nn.Parameter):
            if hasattr(x, "to_local"):
                raise ValueError(
                    f"got a {type(x).__name__}; attention takes the rows of this rank as plain tensors: give x.to_local() for each"
                )
            return False
    return True


def group_name(group: Any) -> str | None:
    """The name by which an operator finds a group again, empty for one rank alone; None where it has none."""
    if group is None:
        return ""
    if hasattr(group, "get_group"):
        connect(group)  # refuses a mesh of two axes
        group = group.get_group()
    return group.group_name if isinstance(group, torch.distributed.ProcessGroup) else None


def _runtime(group: str) -> Transport:
    if not group:
        return connect(None)
    return connect(torch.distributed.distributed_c10d._resolve_process_group(group))

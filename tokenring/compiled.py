"""Attention inside `torch.compile`: the operator of `operators.py`, whose arguments become constants of the graph.

Imported while a graph is traced, and only then. A Layout, Mask, Plan or Topology is a constant that the graph is guarded on by
its value: another one compiles again. A plan as a tensor is an input of the graph, and compiles nothing again.

Every rank compiles the same program, and so makes its calls in the same order. Two things in a graph may hang on sizes, which
uneven shards do not share: where inductor puts calls that do not need each other's results, and whether a checkpointed call is
made again. Inside one graph give such calls an order, and checkpoint with `save_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tokenring import operators
from tokenring.plans.spec import KINDS, to_text

if not hasattr(pytree, "register_constant"):
    raise ImportError(
        f"torch.compile of tokenring.attention needs torch 2.7 or newer; this is torch {torch.__version__}"
    )


def attention_in_graph(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    group: Any,
    scale: float | None,
    softcap: float | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Traced by torch.compile: everything but the tensors and the two numbers is known when the graph is made."""
    packed = options["plan"] if isinstance(options["plan"], Tensor) else None
    names, parts = [], []
    for name, option in options.items():
        if option is not None and not (name == "plan" and packed is not None):
            names.append(name)
            parts.append(option.text_in_graph() if isinstance(option, KINDS) else _part(name, option))
    spec = _joined(tuple(names), tuple(parts))
    return torch.ops.tokenring.attention(q, k, v, sinks, packed, _group_name(group), spec, scale, softcap)


def _group_name(group: Any) -> str:
    if group is None:
        return ""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError("group is a DeviceMesh of several axes; give one axis of it, for instance mesh['cp']")
        group = group.get_group()
    if isinstance(group, torch.distributed.ProcessGroup):
        return group.group_name
    raise ValueError(
        "group is neither a ProcessGroup nor a DeviceMesh nor None; threads of one process cannot be found again by name, "
        "so a graph cannot hold them: leave torch.compile out of run_local"
    )


@torch.compiler.assume_constant_result
def _part(name: str, option: Any) -> str:
    return operators.part_text(name, option)


@torch.compiler.assume_constant_result
def _joined(names: tuple[str, ...], parts: tuple[str, ...]) -> str:
    return operators.joined(names, parts)


@torch.compiler.assume_constant_result
def text_in_graph(self: Any) -> str:
    return to_text(self)


# Dynamo compares a registered constant by value before it uses a graph again, and calls a method whose result is marked constant
# on the object itself, where it would trace a function through every run of a layout.
for _kind in KINDS:
    pytree.register_constant(_kind)
    _kind.text_in_graph = text_in_graph

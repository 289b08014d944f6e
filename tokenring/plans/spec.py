"""Plans, layouts, masks and topologies as text: what a graph holds of a call, and what a compiled step is handed for a batch.

The text is JSON, and says all: reading it gives an equal value, in another process too.

    {"layout": {"name": "zigzag", "total": 6, "world": 2}, "mask": {"cells": [[0, null, 0, null, null, 0]]}, "schedule": "ring"}

A layout that its name makes again goes without its runs. An open end of a mask's cell is null.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tokenring.layout import Layout
from tokenring.links.topology_file import from_dict, to_dict
from tokenring.mask import END, Limits, Mask
from tokenring.plans.plan import Plan
from tokenring.plans.problem import Problem
from tokenring.plans.shape import AttentionShape
from tokenring.schedules import builder
from tokenring.segments import Segment, Tile
from tokenring.topology import Topology

KINDS = (Layout, Mask, Plan, Topology)


@lru_cache(maxsize=1024)
def to_text(value: Layout | Mask | Plan | Topology) -> str:
    """A value as JSON.

    >>> to_text(Layout.zigzag(6, 2)), to_text(Mask.causal())
    ('{"name":"zigzag","total":6,"world":2}', '{"cells":[[0,null,0,null,null,0]]}')
    """
    for kind, encode in ((Layout, _layout), (Mask, _mask), (Plan, _plan), (Topology, to_dict)):
        if isinstance(value, kind):
            return json.dumps(encode(value), separators=(",", ":"))
    raise ValueError(f"a {type(value).__name__} has no text; give a Layout, Mask, Plan or Topology")


def layout_of(said: dict[str, Any]) -> Layout:
    """The layout that a text's values say."""
    name, total, world, offset = said["name"], said["total"], said["world"], said.get("offset", 0)
    if "runs" in said:
        runs = tuple(tuple(Segment(*run) for run in rank) for rank in said["runs"])
        return Layout(total, world, offset, runs, name)
    made = _regular(name, total, world, offset)
    assert made is not None
    return made


def mask_of(said: dict[str, Any]) -> Mask:
    """The mask that a text's values say."""
    cells = []
    for q_start, q_stop, k_start, k_stop, lower, upper, *batch in said["cells"]:
        q_stop, k_stop = (END if stop is None else stop for stop in (q_stop, k_stop))
        cells.append(Tile(q_start, q_stop, k_start, k_stop, lower, upper, tuple(batch) or None))
    return Mask(tuple(cells), Limits(**said.get("limits", {})))


def topology_of(said: dict[str, Any]) -> Topology:
    """The topology that a text's values say."""
    return from_dict(said)


def plan_of(said: dict[str, Any]) -> Plan:
    """The plan that a text's values say."""
    shape = AttentionShape(**said["shape"] | {"dtype": getattr(torch, said["shape"]["dtype"])})
    q_layout = layout_of(said["q_layout"])
    kv_layout = layout_of(said["kv_layout"]) if "kv_layout" in said else q_layout
    direction, partial = said["direction"], said["partial_dtype"]
    heads = shape.q_heads, shape.kv_heads
    problem = Problem(q_layout.world, q_layout, kv_layout, mask_of(said["mask"]), direction, *heads)
    make = builder(said["schedule"], problem.world, problem.backward)
    return Plan(said["schedule"], problem, shape, make, said["why"], partial and getattr(torch, partial))


def plan_tensor(plan: Plan) -> Tensor:
    """A plan as a uint8 tensor on the CPU, for `attention(..., plan=...)` inside `torch.compile`.

    A Plan is a constant of the graph, and another one compiles the step again. A tensor is an input: make one for each batch
    and every batch runs the same compiled step.

    >>> shape = AttentionShape(1, 6, 6, 2, 1, 4, dtype=torch.float32)
    >>> from tokenring.planning import plan
    >>> ring = plan("ring", world=2, shape=shape, layout="contiguous")
    >>> plan_of_tensor(plan_tensor(ring)) == ring
    True
    """
    if not isinstance(plan, Plan):
        raise ValueError(f"plan is a {type(plan).__name__}; give what tokenring.plan made")
    return torch.frombuffer(bytearray(to_text(plan).encode()), dtype=torch.uint8)


def plan_of_tensor(tensor: Tensor) -> Plan:
    """The plan of `plan_tensor`'s tensor."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.device.type != "cpu":
        raise ValueError(
            f"plan is a {tensor.dtype} tensor of shape {tuple(tensor.shape)} on {tensor.device}; "
            "give a Plan, or what tokenring.plan_tensor made of one, on the CPU"
        )
    return _plan_of_bytes(tensor.contiguous().numpy().tobytes())


@lru_cache(maxsize=256)
def _plan_of_bytes(text: bytes) -> Plan:
    try:
        return plan_of(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"plan is a tensor that holds no plan ({type(error).__name__}: {error}); give what tokenring.plan_tensor made"
        ) from error


def _layout(layout: Layout) -> dict[str, Any]:
    said = {"name": layout.name, "total": layout.total, "world": layout.world}
    if layout.offset:
        said["offset"] = layout.offset
    if _regular(layout.name, layout.total, layout.world, layout.offset) != layout:
        said["runs"] = [[[run.start, run.count, run.stride] for run in rank] for rank in layout.runs]
    return said


def _regular(name: str, total: int, world: int, offset: int) -> Layout | None:
    """The layout that a name makes, if it is one that needs no runs."""
    if striped := re.fullmatch(r"striped\((\d+)\)", name):
        return Layout.striped(total, world, offset, block=int(striped[1]))
    return getattr(Layout, name)(total, world, offset) if name in ("contiguous", "zigzag") else None


def _mask(mask: Mask) -> dict[str, Any]:
    cells = []
    for c in mask.cells:
        q_stop, k_stop = (None if stop == END else stop for stop in (c.q_stop, c.k_stop))
        cells.append([c.q_start, q_stop, c.k_start, k_stop, c.lower, c.upper, *(c.batch or ())])
    limits = {name: value for name, value in asdict(mask.limits).items() if value != getattr(Limits(), name)}
    return {"cells": cells} | ({"limits": limits} if limits else {})


def _plan(plan: Plan) -> dict[str, Any]:
    problem, partial = plan.problem, plan.partial_dtype
    said = {
        "schedule": plan.schedule,
        "direction": problem.direction,
        "shape": asdict(plan.shape) | {"dtype": _dtype_name(plan.shape.dtype)},
        "q_layout": _layout(problem.q_layout),
        "mask": _mask(problem.mask),
        "partial_dtype": None if partial is None else _dtype_name(partial),
        "why": plan.why,
    }
    if problem.kv_layout != problem.q_layout:
        said["kv_layout"] = _layout(problem.kv_layout)
    try:
        same = plan_of(said) == plan
    except ValueError:
        same = False
    if not same:
        raise ValueError(
            f"the plan {plan.schedule!r} has no text, because no name makes its steps; give one that tokenring.plan made"
        )
    return said


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

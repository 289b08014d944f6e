"""From a call to its plan: `plan`, and the plan of the tensors that `attention` was given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenring.arguments import check_mask, wire_dtype
from tokenring.choose import choose_plan
from tokenring.layout import Layout
from tokenring.mask import Mask
from tokenring.plans.plan import Plan
from tokenring.plans.problem import Problem
from tokenring.plans.shape import AttentionShape
from tokenring.transport import Transport

if TYPE_CHECKING:
    from tokenring.topology import Topology


def plan(
    schedule: str = "auto",
    *,
    world: int,
    shape: AttentionShape,
    layout: Layout | str,
    kv_layout: Layout | str | None = None,
    mask: Mask | str = "causal",
    direction: str = "forward",
    partial_dtype: str | torch.dtype | None = None,
    topology: Topology | None = None,
) -> Plan:
    """The plan of a schedule: what every rank sends, computes and merges, before anything runs.

    Args:
        schedule: "ring", "biring", "tokenring", "gather", "mesh:AxB", "ulysses", "usp:UxR", "hybrid:OUTER/INNER@SIZE", or
            "auto" (see `tokenring.choose`); backward also "ring:direct".
        world: how many ranks.
        shape: the global shape of the call.
        layout: a Layout, or a name for `shape.q_length` positions.
        kv_layout: where keys and values are cut differently from queries. With the query layout's offset left at 0, causal
            and window masks then align bottom-right: query offset = kv length - query length.
        mask: "causal", "full" or a Mask.
        direction: "forward" or "backward".
        partial_dtype: "input" (default), "float32" or a dtype: in which partial gradients travel straight home. Those that
            ride with their block (backward "ring") are always float32 (float64 for float64).
        topology: the links, for "auto"; where not given it counts bytes.

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
    return choose_plan(schedule, problem, shape, wire_dtype(partial_dtype), topology)


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
    if align and not q_layout.offset and mask.aligned:
        offset = k_layout.offset + k_layout.total - q_layout.total
        if offset < 0:
            raise ValueError(
                f"{q_layout.total} queries are more than {k_layout.total} keys, and cannot align bottom-right; "
                "give the query layout an offset"
            )
        q_layout = q_layout.at(offset)
    check_mask(mask, q_layout, k_layout, shape.batch)
    return Problem(q_layout.world, q_layout, k_layout, mask, direction, shape.q_heads, shape.kv_heads)


def plan_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runtime: Transport,
    layout: Any,
    kv_layout: Any,
    mask: Mask | str,
    schedule: str,
    topology: Topology | None = None,
) -> Plan:
    """The plan of the tensors that one rank was given, whose shards say how long the sequence is."""
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
    return choose_plan(schedule, problem, shape, None, topology)

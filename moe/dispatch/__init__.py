"""Token dispatchers, one file each, behind one protocol."""

from __future__ import annotations

from typing import Any

from moe.dispatch.allgather import AllGather
from moe.dispatch.alltoall import AllToAll
from moe.dispatch.auto import Auto
from moe.dispatch.base import Dispatched, Dispatcher, MoETraffic
from moe.dispatch.dedup import Dedup
from moe.dispatch.hierarchical import Hierarchical
from tokenring.topology import Topology

__all__ = ["DISPATCHERS", "Dispatched", "Dispatcher", "MoETraffic", "build_dispatcher"]

DISPATCHERS = {kind.name: kind for kind in (AllGather, AllToAll, Dedup, Hierarchical, Auto)}

KERNELS = {"deepep": "DeepEP", "hybridep": "HybridEP"}


def build_dispatcher(
    name: str,
    *,
    num_experts: int,
    ep_group: Any = None,
    etp_group: Any = None,
    ranks_per_node: int | None = None,
    topology: Topology | None = None,
    align: int = 1,
    **kernel_options: Any,
) -> Dispatcher:
    """A dispatcher by name. Collective over both groups the first time they are used.

    Args:
        name: "allgather", "alltoall", "dedup", "hierarchical"; "auto": whichever of them is modelled to be the fastest;
            "deepep", "hybridep": kernels of the package deep_ep, where it is installed (see `moe.integrations.deep_ep`).
        num_experts: E, over all ranks.
        ep_group, etp_group: process groups (or 1-D DeviceMeshes, or in-process groups); None: one rank.
        ranks_per_node: consecutive ranks of the EP x ETP block (ETP fastest) that share a node; None: one node. Only
            "hierarchical" and "auto" send differently for it.
        topology: links of the EP x ETP block, for "auto".
        align: see `Dispatcher`.
        kernel_options: of "deepep" (buffer) and "hybridep" (max_tokens, buffer).

    >>> import torch
    >>> d = build_dispatcher("dedup", num_experts=2)
    >>> sent = d.dispatch(torch.ones(3, 4), torch.tensor([[1], [0], [-1]]), torch.ones(3, 1))
    >>> sent.tokens_per_expert.tolist(), d.combine(sent.tokens, sent)[:, 0].tolist()
    ([1, 1], [1.0, 1.0, 0.0])
    """
    if name in KERNELS:
        from moe.integrations import deep_ep

        kind = getattr(deep_ep, KERNELS[name])
        return kind(num_experts=num_experts, ep_group=ep_group, etp_group=etp_group, align=align, **kernel_options)
    if kernel_options:
        raise ValueError(f"{name!r} knows no {sorted(kernel_options)}; these are options of {', '.join(KERNELS)}")
    if name not in DISPATCHERS:
        raise ValueError(f"dispatcher is {name!r}; give one of {', '.join([*DISPATCHERS, *KERNELS])}")
    options: dict[str, Any] = {}
    if name in ("hierarchical", "auto"):
        options["ranks_per_node"] = ranks_per_node
    if name == "auto":
        options["topology"] = topology
    elif topology is not None:
        raise ValueError(f"topology= is for dispatcher 'auto'; {name!r} sends the same over any links")
    return DISPATCHERS[name](num_experts=num_experts, ep_group=ep_group, etp_group=etp_group, align=align, **options)

"""The torch.distributed groups of a folding: made once, one communicator for each different set of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from moe.folding import Folding
from tokenring.transport import connect

AXES = ("tp", "cp", "dp", "pp", "tp-cp", "tp-cp-dp", "etp", "ep", "edp", "etp-ep")


@dataclass(frozen=True)
class FoldingGroups:
    """This rank's process groups, by axes: `groups["ep"]`, `groups["tp-cp"]`."""

    folding: Folding
    """What they were made from."""
    by_axes: dict[str, dist.ProcessGroup]
    """One for each entry of `moe.folding_groups.AXES`; equal sets of ranks share one."""
    ranks: tuple[int, ...]
    """Global ranks of the folding's ranks 0, 1, 2, ..."""

    def __getitem__(self, axes: str) -> dist.ProcessGroup:
        if axes not in self.by_axes:
            raise ValueError(f"no group of axes {axes!r}; there are {', '.join(self.by_axes)}")
        return self.by_axes[axes]


def create_groups(folding: Folding, *, group: Any = None, backend: str | None = None) -> FoldingGroups:
    """Collective over all ranks of `group`, as many as the folding's world.

    Args:
        folding: the mappings; its rank r is rank r of `group`.
        group: a ProcessGroup or a 1-D DeviceMesh that this rank belongs to, part of the job or all of it; ranks outside of it
            take no part. None: the default group.
        backend: as in `torch.distributed.new_group`; None: that of `group`.
    """
    if not dist.is_initialized():
        raise ValueError("torch.distributed is not initialised; call init_process_group before create_groups")
    whole = _process_group(group)
    if whole.size() != folding.world:
        raise ValueError(
            f"the folding is for world={folding.world}, but the group has {whole.size()} ranks; make them equal, or give the "
            "group of the ranks it is for as group="
        )
    everyone = dist.get_process_group_ranks(whole)
    if group is not None:
        _same_history(whole)
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    mine: dict[str, dist.ProcessGroup] = {}
    for axes in AXES:
        for places in folding.groups(axes):
            key = tuple(everyone[place] for place in places)
            here = whole.rank() in places
            # members alone make a group of a part of the job: the rest may not even be listening
            if key not in made and (here or group is None):
                made[key] = dist.new_group(
                    list(key), backend=backend or dist.get_backend(whole), use_local_synchronization=group is not None
                )
            if here:
                mine[axes] = made[key]
    return FoldingGroups(folding, mine, tuple(everyone))


def _process_group(group: Any) -> dist.ProcessGroup:
    if group is None:
        return dist.group.WORLD
    if hasattr(group, "mesh_dim_names"):
        if group.ndim != 1:
            raise ValueError(f"group is a {group.ndim}-D DeviceMesh; give one axis of it, or None for the whole job")
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group is {group!r}; give a ProcessGroup that this rank belongs to, a 1-D DeviceMesh, or None for the whole job"
        )
    return group


def _same_history(whole: dist.ProcessGroup) -> None:
    """Groups that only their members make are named after how many groups a rank is in already; where these numbers differ,
    ranks would wait for each other for ever. Those in fewer first join some of their own."""
    transport = connect(whole)
    own = len(distributed_c10d._world.pg_names)
    numbers = transport.all_gather(torch.tensor([own], device=transport.device), same_shape=True, control=True)
    for _ in range(max(int(n) for n in numbers) - own):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)

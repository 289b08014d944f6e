"""The torch.distributed groups of a folding: made once, one communicator for each different set of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tokenring.transport import connect

AXES = ("tp", "cp", "dp", "pp", "tp-cp", "tp-cp-dp", "etp", "ep", "edp", "etp-ep")


class RankMapping(Protocol):
    """What is asked of a `moe.Folding` here; equal ones have equal groups."""

    @property
    def world(self) -> int:
        """How many ranks."""

    def groups(self, axes: str) -> list[list[int]]:
        """Ranks that differ on these axes only."""


@dataclass(frozen=True)
class FoldingGroups:
    """This rank's process groups, by axes: `groups["ep"]`, `groups["tp-cp"]`."""

    folding: RankMapping
    """What they were made from."""
    by_axes: dict[str, dist.ProcessGroup]
    """One for each entry of `moe.folding_groups.AXES`; equal sets of ranks share one."""
    ranks: tuple[int, ...]
    """Global ranks of the folding's ranks 0, 1, 2, ..."""

    def __getitem__(self, axes: str) -> dist.ProcessGroup:
        if axes not in self.by_axes:
            raise ValueError(f"no group of axes {axes!r}; there are {', '.join(self.by_axes)}")
        return self.by_axes[axes]


def create_groups(folding: RankMapping, *, group: Any = None, backend: str | None = None) -> FoldingGroups:
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
    group = None if whole is dist.group.WORLD else whole
    if whole.size() != folding.world:
        raise ValueError(
            f"the folding is for world={folding.world}, but the group has {whole.size()} ranks; make them equal, or give the "
            "group of the ranks it is for as group="
        )
    everyone = dist.get_process_group_ranks(whole)
    backend = backend or dist.get_backend(whole)
    if group is None:
        made = {ranks: dist.new_group(list(ranks), backend=backend) for ranks in _all_sets(folding, everyone)}
    else:
        mine = [ranks for ranks in _all_sets(folding, everyone) if dist.get_rank() in ranks]
        _agree_on_names(whole, mine)
        # members alone make a group of a part of the job: the rest may not even be listening
        made = {ranks: dist.new_group(list(ranks), backend=backend, use_local_synchronization=True) for ranks in mine}
    by_axes = {axes: made[next(s for s in _sets(folding, axes, everyone) if dist.get_rank() in s)] for axes in AXES}
    return FoldingGroups(folding, by_axes, tuple(everyone))


def mesh_of(folding: RankMapping, names: tuple[str, ...], device_type: str, groups: FoldingGroups | None) -> DeviceMesh:
    """A mapping as a DeviceMesh, its slowest axis first; over the groups given, or, collectively, with groups of its own."""
    sizes = tuple(len(folding.groups(name)[0]) for name in names)
    if groups is None:
        return init_device_mesh(device_type, sizes, mesh_dim_names=names)
    if groups.folding != folding:
        raise ValueError(f"groups are those of {groups.folding}; give those of {folding}")
    ranks = torch.tensor(groups.ranks).view(sizes)
    return DeviceMesh.from_group([groups[name] for name in names], device_type, ranks, mesh_dim_names=names)


def _sets(folding: RankMapping, axes: str, everyone: list[int]) -> list[tuple[int, ...]]:
    """The groups of these axes as global ranks."""
    return [tuple(everyone[place] for place in places) for places in folding.groups(axes)]


def _all_sets(folding: RankMapping, everyone: list[int]) -> list[tuple[int, ...]]:
    """Every different set of ranks, in an order that is alike on all of them."""
    return list(dict.fromkeys(ranks for axes in AXES for ranks in _sets(folding, axes, everyone)))


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


def _agree_on_names(whole: dist.ProcessGroup, sets: list[tuple[int, ...]]) -> None:
    """Collective over `whole`: bring all its ranks to where `sets` can be made, one after the other.

    torch names a group that only its members make after how many groups a rank is in at that moment. Where these numbers
    differ, members would wait for each other for ever; and a name that was in use before, by a group since destroyed, leads to
    its old addresses. So ranks join groups of their own until all are in equally many, and no name comes twice.
    """
    transport, store = connect(whole), dist.PrefixStore("folding", dist.group.WORLD.get_group_store())

    def names(count: int) -> list[str]:
        return [f"{count + i}:{ranks}" for i, ranks in enumerate(sets)]

    own = count = len(distributed_c10d._world.pg_names)
    while True:
        wanted = count + any(store.check([name]) for name in names(count))
        said = torch.tensor([wanted], device=transport.device)
        all_said = [int(n) for n in transport.all_gather(said, same_shape=True, control=True)]
        if set(all_said) == {count}:
            break
        count = max(all_said)
    for name in names(count):
        store.set(name, "")
    for _ in range(count - own):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)

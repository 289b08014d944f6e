"""The torch.distributed groups of a folding: made once, one communicator for each different set of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from moe.folding import Folding

AXES = ("tp", "cp", "dp", "pp", "tp-cp", "tp-cp-dp", "etp", "ep", "edp", "etp-ep")


@dataclass(frozen=True)
class FoldingGroups:
    """This rank's process groups, by axes: `groups["ep"]`, `groups["tp-cp"]`."""

    folding: Folding
    """What they were made from."""
    by_axes: dict[str, dist.ProcessGroup]
    """One for each entry of `moe.folding_groups.AXES`; equal sets of ranks share one."""

    def __getitem__(self, axes: str) -> dist.ProcessGroup:
        if axes not in self.by_axes:
            raise ValueError(f"no group of axes {axes!r}; there are {', '.join(self.by_axes)}")
        return self.by_axes[axes]


def create_groups(folding: Folding, *, backend: str | None = None) -> FoldingGroups:
    """Collective over all ranks of the default group, whose size is the folding's world.

    Args:
        folding: the mappings.
        backend: as in `torch.distributed.new_group`; None: that of the default group.
    """
    if not dist.is_initialized():
        raise ValueError("torch.distributed is not initialised; call init_process_group before create_groups")
    world, rank = dist.get_world_size(), dist.get_rank()
    if world != folding.world:
        raise ValueError(f"the folding is for world={folding.world}, but {world} ranks run; make them equal")
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    mine: dict[str, dist.ProcessGroup] = {}
    for axes in AXES:
        for ranks in folding.groups(axes):
            key = tuple(ranks)
            if key not in made:
                made[key] = dist.new_group(ranks, backend=backend)
            if rank in ranks:
                mine[axes] = made[key]
    return FoldingGroups(folding, mine)

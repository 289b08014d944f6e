"""The reduced sequence, spread: text and kept visual rows, each rank with the rows its layout gives it.

    kept rows lie where their frames were encoded  ──(one uneven all-to-all)──>  they lie where the layout wants them

Only rows that change rank travel, once; text is embedded where it is wanted. Positions are those of the unreduced prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from launch.models.base import VISUAL, Adapter, Prompt, splice
from launch.watch import Kept
from tokenring.layout import Layout
from tokenring.transport import Transport


@dataclass(frozen=True)
class Ownership:
    """Which rank holds each kept visual row after the reduction, and the row's number in the whole video (ascending)."""

    index: Tensor
    owner: Tensor

    @classmethod
    def agree(cls, kept: Kept, runtime: Transport) -> Ownership:
        """Collective: every rank learns where all rows lie. Only row numbers travel."""
        parts = [part.cpu() for part in runtime.all_gather(kept.index.to(kept.x.device), control=True)]
        owners = torch.cat([torch.full_like(part, rank) for rank, part in enumerate(parts)])
        index = torch.cat(parts)
        order = index.argsort()
        return cls(index[order], owners[order])

    def gather(self, x: Tensor, runtime: Transport) -> Tensor:
        """All ranks' rows, in the order of the video."""
        rows = torch.cat(runtime.all_gather(x))
        by_rank = torch.argsort(self.owner, stable=True)
        whole = torch.empty_like(rows)
        whole[by_rank.to(rows.device)] = rows
        return whole


@dataclass(frozen=True)
class Part:
    """One rank's share of the sequence, ready for the language model."""

    embeds: Tensor
    positions: Tensor
    planes: Tensor | None
    visual_rows: Tensor | None


def spread(adapter: Adapter, short: Prompt, kept: Kept, who: Ownership, layout: Layout, runtime: Transport) -> Part:
    """Move the kept rows to the ranks that the layout names, and put the text between them. Collective."""
    slots = short.visual_slots
    target = torch.empty(layout.total, dtype=torch.int64)
    for rank in range(layout.world):
        target[layout.positions(rank)] = rank
    goal = target[slots]
    mine = layout.positions(runtime.rank)
    ids = short.input_ids[mine]
    number = torch.full((layout.total,), -1, dtype=torch.int64)
    number[slots] = torch.arange(slots.numel())
    wanted = number[mine][ids == VISUAL]
    x = _move(kept.x, goal, who, runtime, wanted)
    planes = None if kept.planes is None else _move(kept.planes, goal, who, runtime, wanted)
    visual = (ids == VISUAL).nonzero().flatten()
    return Part(splice(adapter, ids, x), short.positions[:, mine], planes, visual if planes is not None else None)


def _move(rows: Tensor, goal: Tensor, who: Ownership, runtime: Transport, wanted: Tensor) -> Tensor:
    """The visual rows `wanted` (numbers among the kept ones, in the order of the local rows), from wherever they lie.

    Both sides list rows in the order of the video: what rank s sends to rank r are the rows with owner s and goal r.
    """
    leaving = goal[who.owner == runtime.rank]
    parts = [rows[(leaving == peer).to(rows.device)].contiguous() for peer in range(runtime.world)]
    ordered = wanted.sort().values
    arrived = torch.empty((wanted.numel(), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    for source, part in enumerate(runtime.all_to_all(parts)):
        arrived[(who.owner[ordered] == source).to(rows.device)] = part
    return arrived[torch.searchsorted(ordered, wanted).to(rows.device)]

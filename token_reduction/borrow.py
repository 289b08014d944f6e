"""Rows of a plane that live on other ranks, for merges whose tokens do not all lie here.

    extended plane = [ this rank's rows | rows asked of other ranks, ascending by global number ]

What travels is agreed once, when the reduction is made; each plane that is merged then costs one exchange of those rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from token_reduction.tokens import TokenShard
from tokenring.transport import Transport


@dataclass(frozen=True, eq=False)
class Borrow:
    """Which of this rank's rows every rank gets, and where the rows that come back belong.

    Attributes:
        transport: of the ranks that hold the batch.
        sends: for each rank, (m,) int64 local rows it asked for.
        places: for each rank, (m,) int64 places among the borrowed rows for what it sends.
        count: borrowed rows.
    """

    transport: Transport
    sends: Sequence[Tensor]
    places: Sequence[Tensor]
    count: int

    @classmethod
    def agree(cls, shard: TokenShard, wanted: Tensor, transport: Transport) -> Borrow | None:
        """Collective. wanted: (m,) ascending global rows that live elsewhere. None where no rank wants any."""
        asked = transport.all_gather(wanted)
        if not any(part.numel() for part in asked):
            return None
        sends, numbers = [], []
        for part in asked:
            at = shard.find(part)
            numbers.append((at >= 0).nonzero()[:, 0])
            sends.append(at[at >= 0])
        return cls(transport, sends, transport.all_to_all(numbers), wanted.numel())

    def extend(self, plane: Tensor) -> Tensor:
        """(n, ...) -> (n + count, ...). Collective: every rank of the reduction calls it with its part of the same plane."""
        borrowed = plane.new_empty((self.count, *plane.shape[1:]))
        rows = self.transport.all_to_all([plane[at.to(plane.device)].contiguous() for at in self.sends])
        for places, part in zip(self.places, rows):
            borrowed[places.to(plane.device)] = part
        return torch.cat([plane, borrowed])

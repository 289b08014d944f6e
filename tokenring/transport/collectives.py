"""Collectives with uneven sizes, made of a transport's three verbs on lane 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenring.transport.messages import Message


class Collectives:
    """What every transport can do with `open`, `push` and `wait`."""

    rank: int
    world: int

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], *, control: bool = False) -> None:
        """One exchange on lane 0, start to end. Sizes must already be known on both sides."""
        if self.world == 1:
            return
        self.open(0, -1, receives)
        self.push(0, -1, [(peer, tensor.contiguous()) for peer, tensor in sends], control=control)
        self.wait(0, -1)

    def all_gather(self, x: Tensor, *, same_shape: bool = False, control: bool = False) -> list[Tensor]:
        """Every rank's `x` in rank order. Shapes may differ in dim 0 only; `same_shape=True` skips the size round."""
        peers = [p for p in range(self.world) if p != self.rank]
        sizes = [x.shape[0] if x.dim() else 1] * self.world
        if x.dim() and not same_shape and self.world > 1:
            own = torch.tensor([x.shape[0]], dtype=torch.int64, device=x.device)
            notes = {p: torch.empty_like(own) for p in peers}
            self.exchange([(p, own) for p in peers], list(notes.items()), control=True)
            for p, note in notes.items():
                sizes[p] = int(note)
        parts = {p: x.new_empty((sizes[p], *x.shape[1:]) if x.dim() else ()) for p in peers}
        self.exchange([(p, x) for p in peers], list(parts.items()), control=control)
        parts[self.rank] = x
        return [parts[p] for p in range(self.world)]

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """`parts[p]` goes to rank p; returns what each rank sent here. Sizes in dim 0 may differ, and may be 0."""
        if len(parts) != self.world:
            raise ValueError(
                f"all_to_all got {len(parts)} parts for {self.world} ranks; give one part for each rank, empty ones too"
            )
        peers = [p for p in range(self.world) if p != self.rank]
        own = {p: torch.tensor([parts[p].shape[0]], dtype=torch.int64, device=parts[p].device) for p in peers}
        notes = {p: torch.empty_like(own[p]) for p in peers}
        self.exchange(list(own.items()), list(notes.items()), control=True)
        received = {p: parts[p].new_empty((int(notes[p]), *parts[p].shape[1:])) for p in peers}
        self.exchange([(p, parts[p]) for p in peers], list(received.items()))
        received[self.rank] = parts[self.rank]
        return [received[p] for p in range(self.world)]

    def broadcast(self, x: Tensor, source: int, *, control: bool = False) -> Tensor:
        """`x` of rank `source` on every rank; the others give a tensor of the same shape, dtype and device to receive it."""
        if self.rank == source:
            self.exchange([(p, x) for p in range(self.world) if p != source], [], control=control)
        else:
            self.exchange([], [(source, x)], control=control)
        return x

"""One hop: rows go from every rank of a few to others of them, and sums of rows come back the same way.

    forward   received = rows picked for this rank by each peer, in the order of the peers
    reverse   its adjoint: what was received goes home, and is added up there in float32

A `Stage` says which ranks take part and by what rule rows are chosen; a `Hop` is what became of it for one batch. A message
a peer: the one for the peer s places on leaves while the next one is picked, and all receives are posted before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.dispatch.rows import sum_dtype
from tokenring.transport import Transport

ROW_LANE = 1
_step_numbers = itertools.count()
"""Names for exchanges under way; no two of this process are alike."""


@dataclass(frozen=True)
class Stage:
    """Ranks that exchange rows, and which rows each of them gets."""

    transport: Transport
    """Of the group they belong to."""
    peers: tuple[int, ...]
    """Ranks of the group that take part, in rank order; this one is among them."""
    rule: str
    """"unique": a row once to each peer that wants it; "copies": once for every entry; "all": every row to every peer, its
    entries to those they are for; "replicate": every row and entry to every peer."""
    first: int
    """Lowest expert behind the first peer."""
    width: int
    """How many experts are behind one peer; with "replicate" all peers hold parts of the same."""

    @property
    def place(self) -> int:
        """Where this rank stands among the peers."""
        return self.peers.index(self.transport.rank)

    def first_of(self, place: int) -> int:
        """Lowest expert behind a peer."""
        return self.first if self.rule == "replicate" else self.first + place * self.width


@dataclass
class Choice:
    """Which rows and entries leave for each peer, in the order of the peers."""

    rows: Tensor | None
    """Indices of rows; None: all rows for every peer."""
    row_splits: list[int]
    entries: Tensor | None
    """Indices of entries; None: all entries for every peer."""
    entry_splits: list[int]
    counts: Tensor | None
    """Entries of each row that leaves; None: one each."""

    def rows_for(self, place: int) -> Tensor | None:
        """Indices of the rows for a peer; None: all."""
        return None if self.rows is None else _part(self.rows, self.row_splits, place)

    def entries_for(self, place: int) -> Tensor | None:
        """Indices of the entries for a peer; None: all."""
        return None if self.entries is None else _part(self.entries, self.entry_splits, place)

    def counts_for(self, place: int) -> Tensor | None:
        """Entries of each row for a peer; None: one each."""
        if self.counts is None or (self.rows is None and self.entries is None):
            return self.counts
        return _part(self.counts, self.row_splits, place)


def choose_rows(stage: Stage, num_rows: int, entry_row: Tensor, entry_expert: Tensor) -> Choice:
    """Apply a stage's rule to rows whose entries are (row, expert), sorted by row."""
    size, n = len(stage.peers), entry_row.numel()
    if stage.rule == "replicate":
        counts = torch.bincount(entry_row, minlength=num_rows)
        return Choice(None, [num_rows] * size, None, [n] * size, counts)
    target = torch.div(entry_expert - stage.first, stage.width, rounding_mode="floor")
    entry_splits = torch.bincount(target, minlength=size).tolist()
    if stage.rule == "copies":
        order = entry_expert.argsort(stable=True)
        return Choice(entry_row[order], entry_splits, order, entry_splits, None)
    key = target * num_rows + entry_row
    order = key.argsort(stable=True)
    if stage.rule == "all":
        counts = torch.bincount(key, minlength=size * num_rows)
        return Choice(None, [num_rows] * size, order, entry_splits, counts)
    pairs, counts = key[order].unique_consecutive(return_counts=True)
    row_splits = torch.bincount(torch.div(pairs, max(num_rows, 1), rounding_mode="floor"), minlength=size).tolist()
    return Choice(pairs % max(num_rows, 1), row_splits, order, entry_splits, counts)


@dataclass
class Flight:
    """An exchange of rows that is under way."""

    rows: Tensor
    """What it fills or adds up to."""
    slots: dict[int, Tensor]
    """Where the rows of each peer arrive."""
    steps: list[int]
    """Its messages' numbers on the lane."""


@dataclass
class Hop:
    """A stage with the sizes of one batch."""

    stage: Stage
    choice: Choice
    num_rows: int
    """Rows here before the hop."""
    num_entries: int
    """Entries here before the hop."""
    received: list[int]
    """Rows that each peer, this rank too, gives to this rank."""
    received_entries: list[int]

    def start(self, x: Tensor) -> Flight:
        """Post the way of (num_rows, H) to the peers."""
        out = x.new_empty(sum(self.received), x.shape[1])
        slots, place = out.split(self.received), self.stage.place
        flight = Flight(out, dict(enumerate(slots)), self._steps())
        self._post(flight, self._backwards())
        for step, peer in zip(flight.steps, self._onwards()):
            self._push(step, peer, _pick(x, self.choice.rows_for(peer)))
        own = self.choice.rows_for(place)
        if own is None:
            slots[place].copy_(x)
        elif own.numel():
            torch.index_select(x, 0, own, out=slots[place])
        return flight

    def finish(self, flight: Flight) -> Tensor:
        """(sum(received), H): what every peer, this rank too, gave."""
        for step in flight.steps:
            self.stage.transport.wait(ROW_LANE, step)
        return flight.rows

    def start_reverse(self, home: Callable[[int], Tensor], like: Tensor) -> Flight:
        """Post the way back.

        Args:
            home: place of a peer -> (received[place], H) rows for it, in the dtype of `like`.
            like: any tensor of the wire's dtype and device with H columns.
        """
        sent = self.choice.row_splits
        slots = {peer: like.new_empty(sent[peer], like.shape[1]) for peer in self._onwards()}
        total = torch.zeros(self.num_rows, like.shape[1], dtype=sum_dtype(like.dtype), device=like.device)
        flight = Flight(total, slots, self._steps())
        self._post(flight, self._onwards())
        for step, peer in zip(flight.steps, self._backwards()):
            self._push(step, peer, home(peer))
        self._add(total, self.stage.place, home(self.stage.place))
        return flight

    def finish_reverse(self, flight: Flight) -> Tensor:
        """Sums over what every peer sent back, (num_rows, H) in the dtype sums are taken in."""
        for step, peer in zip(flight.steps, self._onwards()):
            self.stage.transport.wait(ROW_LANE, step)
            self._add(flight.rows, peer, flight.slots.pop(peer))
        return flight.rows

    def _add(self, total: Tensor, peer: int, rows: Tensor) -> None:
        index = self.choice.rows_for(peer)
        if index is None:
            total += rows
        elif self.choice.counts is None and total.device.type != "cpu":
            total.index_put_((index,), rows.to(total.dtype), accumulate=True)  # sorts, so repeats bit for bit
        else:
            total.index_add_(0, index, rows.to(total.dtype))

    def reverse_entries(self, values: Tensor) -> Tensor:
        """Numbers, one for each entry that was received, go home and are added up: (num_entries,)."""
        transport, place, peers = self.stage.transport, self.stage.place, self.stage.peers
        parts = values.split(self.received_entries)
        slots = [values.new_empty(n) for n in self.choice.entry_splits]
        others = [p for p in range(len(peers)) if p != place]
        sends = [(peers[p], parts[p]) for p in others if parts[p].numel()]
        receives = [(peers[p], slots[p]) for p in others if slots[p].numel()]
        transport.exchange(sends, receives, control=True)
        slots[place] = parts[place]
        total = values.new_zeros(self.num_entries)
        for p in range(len(peers)):
            index = self.choice.entries_for(p)
            total = total + slots[p] if index is None else total.index_add_(0, index, slots[p])
        return total

    # -- messages: step s goes to the peer s places on and comes from the one s places back, or the other way ----------

    def _onwards(self) -> list[int]:
        size, place = len(self.stage.peers), self.stage.place
        return [(place + shift) % size for shift in range(1, size)]

    def _backwards(self) -> list[int]:
        size, place = len(self.stage.peers), self.stage.place
        return [(place - shift) % size for shift in range(1, size)]

    def _steps(self) -> list[int]:
        return [next(_step_numbers) for _ in self.stage.peers[1:]]

    def _post(self, flight: Flight, sources: list[int]) -> None:
        for step, peer in zip(flight.steps, sources):
            slot = flight.slots[peer]
            self.stage.transport.open(ROW_LANE, step, [(self.stage.peers[peer], slot)] if slot.numel() else [])

    def _push(self, step: int, peer: int, rows: Tensor) -> None:
        sends = [(self.stage.peers[peer], rows.contiguous())] if rows.numel() else []
        self.stage.transport.push(ROW_LANE, step, sends)


def _part(x: Tensor, splits: list[int], place: int) -> Tensor:
    start = sum(splits[:place])
    return x[start : start + splits[place]]


def _pick(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)

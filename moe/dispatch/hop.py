"""One hop: rows go from every rank of a few to others of them, and sums of rows come back the same way.

    forward   received = rows picked for this rank by each peer, in the order of the peers
    reverse   its adjoint: what was received goes home, and is added up there in float32

A `Stage` says which ranks take part and by what rule rows are chosen; a `Hop` is what became of it for one batch. How messages
follow each other: `moe.dispatch.exchange`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.dispatch.exchange import Buffer, Exchange, Giver, Piece, own_pieces, plan_steps, rows_of_a_piece
from moe.dispatch.pages import room
from moe.dispatch.rows import sum_dtype
from tokenring.transport import Transport


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
class Return:
    """Sums on their way home."""

    exchange: Exchange
    total: Tensor
    """(num_rows, H): what has been added up so far."""


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

    def start(self, x: Tensor, patient: bool, out: Tensor | None = None) -> Exchange:
        """Post the way of (num_rows, H) to the peers; what arrives goes to buffers, or to its place in `out` (sum(received), H)."""
        places = None if out is None else out.split(self.received)

        def give(piece: Piece, buffer: Buffer) -> Tensor:
            index = self.choice.rows_for(piece.peer)
            return x[piece.rows] if index is None else torch.index_select(x, 0, index[piece.rows], out=buffer())

        def room(piece: Piece, buffer: Buffer) -> Tensor:
            return buffer() if places is None else places[piece.peer][piece.rows]

        return self._exchange(self.choice.row_splits, self.received, give, room, x, patient)

    def arrive(self, x: Tensor, exchange: Exchange, out: Tensor) -> Tensor:
        """What is under way into `out`, and this rank's own rows of x: (sum(received), H), peer after peer."""
        own, index = out.split(self.received)[self.stage.place], self.choice.rows_for(self.stage.place)
        if index is None:
            own.copy_(x)
        elif index.numel():
            torch.index_select(x, 0, index, out=own)
        exchange.finish(lambda piece, rows: None)
        return out

    def room_for(self, x: Tensor) -> Tensor:
        """(sum(received), H), not filled."""
        return room(x, sum(self.received))

    def start_reverse(
        self,
        home: Callable[[Piece], Tensor],
        like: Tensor,
        patient: bool,
        own: Callable[[], Tensor] | None = None,
    ) -> Return:
        """Post the way back.

        Args:
            home: rows that came from a peer, or this rank's own -> their sums, in the dtype of `like`.
            like: any tensor of the wire's dtype and device with H columns.
            patient: see `Exchange`.
            own: gives (num_rows, H), the sums of this rank's own rows, zeros for others; None: `home` gives them in pieces.
        """
        exchange = self._exchange(
            self.received,
            self.choice.row_splits,
            lambda piece, buffer: home(piece),
            lambda piece, buffer: buffer(),
            like,
            patient,
            onwards=False,
        )
        if own is not None:
            return Return(exchange, own())
        total = room(like, self.num_rows, sum_dtype(like.dtype)).zero_()
        for piece in own_pieces(self.stage.place, self.received[self.stage.place], like):
            self._add(total, piece, home(piece))
        return Return(exchange, total)

    def finish_reverse(self, way: Return) -> Tensor:
        """Sums over what every peer sent back, (num_rows, H) in the dtype sums are taken in."""
        way.exchange.finish(lambda piece, rows: self._add(way.total, piece, rows))
        return way.total

    def _exchange(
        self,
        leave: list[int],
        arrive: list[int],
        give: Giver,
        room: Giver,
        like: Tensor,
        patient: bool,
        *,
        onwards: bool = True,
    ) -> Exchange:
        steps = plan_steps(self.stage.place, leave, arrive, rows_of_a_piece(like), onwards=onwards)
        return Exchange(self.stage.transport, self.stage.peers, steps, give, room, like, patient)

    def _add(self, total: Tensor, piece: Piece, rows: Tensor) -> None:
        index = self.choice.rows_for(piece.peer)
        if index is None:
            total[piece.rows] += rows
        elif self.choice.counts is None and total.device.type != "cpu":
            total.index_put_(
                (index[piece.rows],), rows.to(total.dtype), accumulate=True
            )  # sorts, so repeats bit for bit
        else:
            total.index_add_(0, index[piece.rows], rows.to(total.dtype))

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


def _part(x: Tensor, splits: list[int], place: int) -> Tensor:
    start = sum(splits[:place])
    return x[start : start + splits[place]]

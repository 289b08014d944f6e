"""Where rows lie at their experts: expert after expert, and inside one in the order in which they came.

    row      0    1      2          rows that came, peer after peer, with the entries (expert, weight) of each
    entries  b    a b    a
    place    2    0 3    1          of each entry; an expert's are neighbours, so those of one piece are a run

A run is filled by one copy straight out of the piece that arrived, which is then free again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from moe.dispatch.exchange import Exchange, Piece, own_pieces, rows_of_a_piece
from moe.dispatch.hop import Hop
from moe.dispatch.pages import room
from moe.dispatch.wire import Entries

Run = tuple[int, int, Tensor]
"""Where it starts and stops, and which rows make it: of the piece, or of all that this rank sends where it is its own."""


@dataclass
class Landing:
    """What is known of the places; holds no rows."""

    token_row: Tensor
    """(M,) int64: row behind each expert-major token; -1 where it is filling."""
    place: Tensor
    """(n,) int64: expert-major place of each entry."""
    counts: Tensor
    """Entries of each row."""
    received: list[int]
    """Rows that came from each peer of the last hop."""
    _entries: dict[int, int] = field(default_factory=dict)
    """Entries before a row where a piece may start or stop."""
    _runs: dict[tuple[int, int], list[Run]] = field(default_factory=dict)
    """Of the piece of a peer that starts at a row."""

    def whole(self, x: Tensor) -> Tensor:
        """(M, H) of rows that lie here already."""
        if self.place.numel() == self.token_row.numel():
            return x.index_select(0, self.token_row)
        return self._room(x).index_copy_(0, self.place, x.index_select(0, self.token_row[self.place]))

    def pieces(self, x: Tensor, exchange: Exchange, hop: Hop) -> Tensor:
        """(M, H) of rows that arrive, and of this rank's own out of (num_rows, H)."""
        out, place = self._room(x), hop.stage.place
        index = hop.choice.rows_for(place)
        if out.device.type == "cpu":
            if not self._runs:
                self._find_runs(rows_of_a_piece(x), place, index)
            self._fill(out, x, (place, 0))
            exchange.finish(lambda piece, rows: self._fill(out, rows, (piece.peer, piece.start)))
            return out
        for own in own_pieces(place, self.received[place], x):
            here = x[own.rows] if index is None else x
            self._scatter(out, own, here, None if index is None else index[own.rows], x)
        exchange.finish(lambda piece, rows: self._scatter(out, piece, rows, None, x))
        return out

    def span(self, piece: Piece, like: Tensor) -> tuple[slice, slice]:
        """Rows of a piece among all that came, and their entries among all. `like` tells the size of pieces."""
        if not self._entries:
            self._find_entries(rows_of_a_piece(like))
        first = sum(self.received[: piece.peer])
        rows = slice(first + piece.start, first + piece.stop)
        return rows, slice(self._entries[rows.start], self._entries[rows.stop])

    def _room(self, x: Tensor) -> Tensor:
        out = room(x, self.token_row.numel())
        return out.zero_() if self.place.numel() < self.token_row.numel() else out

    def _fill(self, out: Tensor, rows: Tensor, piece: tuple[int, int]) -> None:
        for start, stop, local in self._runs.get(piece, ()):
            torch.index_select(rows, 0, local, out=out[start:stop])

    def _scatter(self, out: Tensor, piece: Piece, rows: Tensor, index: Tensor | None, like: Tensor) -> None:
        """In one launch: the rows of a piece, or those of `rows` that `index` names, to their places."""
        if piece.start == piece.stop:
            return
        span, entries = self.span(piece, like)
        places = self.place[entries]
        local = self.token_row[places] - span.start
        out.index_copy_(0, places, rows.index_select(0, local if index is None else index[local]))

    def _find_runs(self, most: int, own: int, index: Tensor | None) -> None:
        """All at once; a run ends where the next place is another piece's. What is this rank's own is one piece of any size."""
        cuts = [cut for cut in self._cuts(most) if cut[0] != own or cut[1] == 0]
        first = torch.tensor([row for _, _, row in cuts], dtype=torch.int64)
        piece = torch.searchsorted(first, self.token_row, right=True) - 1  # filling is no piece's
        local = self.token_row - first[piece]
        for number, cut in enumerate(cuts):
            if cut[0] == own and index is not None:
                here = piece == number
                local[here] = index[local[here]]
        stops = (piece.diff() != 0).nonzero().squeeze(1) + 1
        edges = [0, *stops.tolist(), piece.numel()]
        numbers = piece[torch.tensor(edges[:-1])].tolist() if piece.numel() else []
        for number, start, stop in zip(numbers, edges, edges[1:]):
            if number >= 0:
                self._runs.setdefault(cuts[number][:2], []).append((start, stop, local[start:stop]))

    def _cuts(self, most: int) -> Iterator[tuple[int, int, int]]:
        """(peer, first row of what came from it, first row of all) of every piece."""
        first = 0
        for peer, count in enumerate(self.received):
            for start in range(0, count, most):
                yield peer, start, first + start
            first += count

    def _find_entries(self, most: int) -> None:
        edges = [0, sum(self.received), *(row for _, _, row in self._cuts(most))]
        edges += [first + count for first, count in zip(accumulate([0, *self.received]), self.received)]
        before = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])
        self._entries = dict(zip(edges, before[torch.tensor(edges, device=before.device)].tolist()))


def lay_out(
    held: Entries, received: list[int], first_expert: int, local_experts: int, align: int
) -> tuple[Landing, Tensor, Tensor]:
    """(landing, weights, tokens_per_expert): entries in the order of experts, each expert's filled up to `align`."""
    local = held.expert - first_expert
    real = torch.bincount(local, minlength=local_experts)
    order = local.argsort(stable=True)
    sizes = torch.div(real + align - 1, align, rounding_mode="floor") * align
    start = sizes.cumsum(0) - sizes
    before = real.cumsum(0) - real
    expert = local[order]
    position = torch.arange(order.numel(), device=order.device) - before[expert] + start[expert]
    place = torch.empty_like(order)
    place[order] = position
    total = order.numel() if align == 1 else int(sizes.sum())
    token_row = torch.full((total,), -1, dtype=torch.int64, device=order.device)
    token_row[place] = held.row
    weights = held.weight.new_zeros(total)
    weights[place] = held.weight
    counts = torch.bincount(held.row, minlength=held.num_rows)
    return Landing(token_row, place, counts, received), weights, sizes

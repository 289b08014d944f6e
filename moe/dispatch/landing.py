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

Run = tuple[int, Tensor]
"""Where it starts, and which rows of the piece make it."""


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
        for own in own_pieces(place, self.received[place], x):
            here = x[own.rows] if index is None else x
            self._lay(out, own, here, None if index is None else index[own.rows], x)
        exchange.finish(lambda piece, rows: self._lay(out, piece, rows, None, x))
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

    def _lay(self, out: Tensor, piece: Piece, rows: Tensor, index: Tensor | None, like: Tensor) -> None:
        """Copy the rows of a piece, or those of `rows` that `index` names, to their places."""
        if piece.start == piece.stop:
            return
        if out.device.type != "cpu":
            span, entries = self.span(piece, like)
            places = self.place[entries]
            local = self.token_row[places] - span.start
            out.index_copy_(0, places, rows.index_select(0, local if index is None else index[local]))
            return
        for start, local in self._runs_of(piece, like):
            source = local if index is None else index[local]
            torch.index_select(rows, 0, source, out=out[start : start + local.numel()])

    def _runs_of(self, piece: Piece, like: Tensor) -> list[Run]:
        if not self._runs:
            self._find_runs(rows_of_a_piece(like))
        return self._runs.get((piece.peer, piece.start), [])

    def _find_runs(self, most: int) -> None:
        """All at once, as sorting many small pieces takes longer: entries by piece and place; a run ends where either jumps."""
        starts = [(peer, start) for peer, start, _ in self._cuts(most)]
        first = torch.tensor([row for _, _, row in self._cuts(most)], dtype=torch.int64)
        row = self.token_row[self.place]
        piece = torch.searchsorted(first, row, right=True) - 1
        order = (piece * self.token_row.numel() + self.place).argsort()
        place, piece = self.place[order], piece[order]
        local = row[order] - first[piece]
        jumps = (place.diff() != 1) | (piece.diff() != 0)
        at = torch.cat([jumps.new_ones(min(1, place.numel())), jumps]).nonzero().squeeze(1)
        runs = local.tensor_split(at[1:].tolist()) if at.numel() else ()
        for number, start, run in zip(piece[at].tolist(), place[at].tolist(), runs):
            self._runs.setdefault(starts[number], []).append((start, run))

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

"""Rows between a rank and its peers, in pieces: a few pieces are under way while the next one is picked and the last one used.

    step     1         2         3                 one peer at a time: s places on, and s places back
    leaves   to r + 1  to r + 1  to r + 2  ...
    arrives  from r-1  from r-1  from r-2  ...

So memory for what leaves and arrives is that of the pieces under way and not of all rows, and a piece is still in the cache when
it is used. All ranks order their steps by (distance, piece), and wait for them in that order: the first that is not done anywhere
is posted on both of its ends, so nothing waits in a circle.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from moe.dispatch.pages import room
from tokenring.transport import Transport

ROW_LANE = 1
PIECE_BYTES = {"cpu": 2 << 20}
LARGE_PIECE_BYTES = 64 << 20
"""For devices whose launches cost more than their memory."""
AHEAD = 3
"""Steps under way while one is waited for."""
_step_numbers = itertools.count()
"""Names for exchanges under way; no two of this process are alike."""


@dataclass(frozen=True)
class Piece:
    """Rows start to stop of all that go to one peer, or come from it."""

    peer: int
    """Its place among the peers."""
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """As a slice."""
        return slice(self.start, self.stop)


Buffer = Callable[[], Tensor]
"""Gives rows to write to, as many as the piece has."""
Giver = Callable[[Piece, Buffer], Tensor]


@dataclass(frozen=True)
class Step:
    """One message away and one to here; either may be none."""

    leaves: Piece | None
    arrives: Piece | None


def plan_steps(place: int, leave: list[int], arrive: list[int], most: int, *, onwards: bool = True) -> list[Step]:
    """The steps of one rank.

    Args:
        place: of this rank among the peers.
        leave, arrive: rows for and from each peer.
        most: rows of a piece.
        onwards: whether distances are counted upwards (the way there) or downwards (the way back).

    >>> steps = plan_steps(0, [9, 3, 1], [9, 0, 2], 2)
    >>> [(s.leaves.peer, s.leaves.stop) if s.leaves else None for s in steps]
    [(1, 2), (1, 3), (2, 1)]
    >>> [(s.arrives.peer, s.arrives.stop) if s.arrives else None for s in steps]
    [(2, 2), None, None]
    """
    size, steps = len(leave), []
    for distance in range(1, size) if onwards else range(-1, -size, -1):
        to, source = (place + distance) % size, (place - distance) % size
        pairs = itertools.zip_longest(_pieces(to, leave[to], most), _pieces(source, arrive[source], most))
        steps += [Step(*pair) for pair in pairs]
    return steps


def _pieces(peer: int, rows: int, most: int) -> list[Piece]:
    return [Piece(peer, start, min(start + most, rows)) for start in range(0, rows, most)]


def _largest(pieces: Iterable[Piece | None]) -> int:
    return max((piece.stop - piece.start for piece in pieces if piece is not None), default=0)


def own_pieces(place: int, rows: int, like: Tensor) -> list[Piece]:
    """The pieces of what stays at this rank."""
    return _pieces(place, rows, rows_of_a_piece(like))


def rows_of_a_piece(like: Tensor) -> int:
    """How many rows of a tensor (n, H) go together; alike on every rank."""
    limit = PIECE_BYTES.get(like.device.type, LARGE_PIECE_BYTES)
    return max(1, limit // max(1, like.shape[1] * like.element_size()))


class Ring:
    """Buffers that take turns, in one block."""

    def __init__(self, like: Tensor, turns: int, most: int) -> None:
        self._like, self._turns, self._most = like, turns, most
        self._block: Tensor | None = None

    def rows(self, turn: int, count: int) -> Tensor:
        """(count, H) of the buffer whose turn it is."""
        if self._block is None:
            self._block = room(self._like, self._turns * self._most)
        start = turn % self._turns * self._most
        return self._block[start : start + count]


class Exchange:
    """Steps under way.

    Args:
        transport: of the group.
        peers: ranks of the group, by place.
        steps: of `plan_steps`.
        give: (piece, buffer) -> rows that leave; they may lie in the buffer.
        room: (piece, buffer) -> where rows arrive: the buffer, or a place of their own.
        like: any tensor of the wire's dtype and device with H columns.
        patient: whether to post a few steps at a time and not all at once. Whoever has other work between `start` and `finish`
            wants all of them under way; whoever has none saves memory.
    """

    def __init__(
        self,
        transport: Transport,
        peers: tuple[int, ...],
        steps: list[Step],
        give: Giver,
        room: Giver,
        like: Tensor,
        patient: bool,
    ) -> None:
        self._transport, self._peers, self._steps = transport, peers, steps
        self._give, self._room = give, room
        self._numbers = [next(_step_numbers) for _ in steps]
        # one more turn than steps under way: the next is posted before what arrived last is used
        turns = min(AHEAD + 1, len(steps)) if patient else len(steps)
        self._leaving = Ring(like, turns, _largest(step.leaves for step in steps))
        self._arriving = Ring(like, turns, _largest(step.arrives for step in steps))
        self._slots: dict[int, Tensor] = {}
        self._posted = 0
        self._post_up_to(AHEAD if patient else len(steps))

    def finish(self, take: Callable[[Piece, Tensor], None]) -> None:
        """Wait for every step; `take` is given each piece that arrived, in order."""
        for turn, step in enumerate(self._steps):
            self._transport.wait(ROW_LANE, self._numbers[turn])
            self._post_up_to(turn + 1 + AHEAD)
            if step.arrives is not None:
                take(step.arrives, self._slots.pop(turn))

    def _post_up_to(self, count: int) -> None:
        for turn in range(self._posted, min(count, len(self._steps))):
            step, number = self._steps[turn], self._numbers[turn]
            receives, sends = [], []
            if step.arrives is not None:
                piece = step.arrives
                slot = self._room(piece, lambda t=turn, p=piece: self._arriving.rows(t, p.stop - p.start))
                self._slots[turn] = slot
                receives.append((self._peers[piece.peer], slot))
            self._transport.open(ROW_LANE, number, receives)
            if step.leaves is not None:
                piece = step.leaves
                rows = self._give(piece, lambda t=turn, p=piece: self._leaving.rows(t, p.stop - p.start))
                sends.append((self._peers[piece.peer], rows.contiguous()))
            self._transport.push(ROW_LANE, number, sends)
            self._posted = turn + 1

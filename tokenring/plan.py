"""A schedule is data: slots, transfers, tiles, steps, and the Plan that builds them for any rank.

One step of one rank, in order:

    lane 0     what the *next* step computes on travels while this step computes      (keys and values, or queries)
    compute    tiles of a query slot against a key slot give one partial (out, lse)
    lane 1     partials made here for other ranks' queries leave                       (out and lse, straight home)
    merge      partials that came home in the step before, and this step's own, into (out, lse)

A transfer appears at the same (step, lane) on both of its ends. Rows are named by pieces, runs of one owner's local rows, so
a slot can hold what several ranks sent, and its tiles may span them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from tokenring.layout import Layout
from tokenring.mask import Mask
from tokenring.segments import Range, Segment, Tile
from tokenring.shape import AttentionShape

if TYPE_CHECKING:
    from tokenring.check import Report

PAYLOAD_LANE, RETURN_LANE = 0, 1


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows start..stop-1 of the shard of rank `owner`."""

    owner: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Slot:
    """Rows that a rank holds under one name.

    what: "q", "kv" (k and v), "out" (a partial out and lse); backward "qd" (q, do, lse, delta), "dq" and "dkv" (partial
    gradients).
    """

    name: str
    what: str
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        return sum(p.rows for p in self.pieces)

    def locate(self, wanted: Iterable[Piece]) -> tuple[Range, ...]:
        """Where the rows of some pieces lie in this slot, in the order of those pieces; neighbours joined."""
        found: list[Range] = []
        for piece in wanted:
            at = piece.start
            while at < piece.stop:
                first, last = self._run(piece.owner, at, piece.stop)
                at += last - first
                if found and found[-1][1] == first:
                    first = found.pop()[0]
                found.append((first, last))
        return tuple(found)

    def _run(self, owner: int, start: int, stop: int) -> Range:
        row = 0
        for held in self.pieces:
            if held.owner == owner and held.start <= start < held.stop:
                first = row + start - held.start
                return first, first + min(stop, held.stop) - start
            row += held.rows
        raise ValueError(f"slot {self.name} does not hold row {start} of rank {owner}")


@dataclass(frozen=True, slots=True)
class Transfer:
    """Pieces of one slot of the source that arrive in a slot of the destination."""

    source: int
    destination: int
    what: str
    pieces: tuple[Piece, ...]
    source_slot: str
    destination_slot: str

    @property
    def rows(self) -> int:
        return sum(p.rows for p in self.pieces)


@dataclass(frozen=True, slots=True)
class Compute:
    """Tiles of a query slot against a key slot, and the partials they give.

    `results` holds the partial of exactly those query rows that have a tile ("out", backward "dq"), then, backward only, that
    of exactly those key rows that have one ("dkv").
    """

    q: str
    kv: str
    results: tuple[Slot, ...]
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank does in one step. `sends[lane]`, `receives[lane]`; `slots` are those that the receives fill."""

    sends: tuple[tuple[Transfer, ...], tuple[Transfer, ...]] = ((), ())
    receives: tuple[tuple[Transfer, ...], tuple[Transfer, ...]] = ((), ())
    slots: tuple[Slot, ...] = ()
    computes: tuple[Compute, ...] = ()
    merges: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """What a schedule is given: who holds which positions, and which pairs count."""

    world: int
    q_layout: Layout
    kv_layout: Layout
    mask: Mask
    direction: str = "forward"

    @property
    def backward(self) -> bool:
        return self.direction == "backward"

    @property
    def query_result(self) -> str:
        """What a compute gives for queries: "out" forward, "dq" backward."""
        return "dq" if self.backward else "out"

    def segments(self, what: str, pieces: Iterable[Piece]) -> list[Segment]:
        """The position runs of pieces, in order."""
        layout = self.kv_layout if what == "kv" else self.q_layout
        result: list[Segment] = []
        for piece in pieces:
            row = 0
            for run in layout.segments(piece.owner):
                first, last = max(piece.start, row), min(piece.stop, row + run.count)
                if first < last:
                    result.append(run.cut(first - row, last - row))
                row += run.count
        return result

    def tiles(self, q: Iterable[Piece], kv: Iterable[Piece]) -> tuple[Tile, ...]:
        """The tiles of a query slot against a key slot."""
        return self.mask.tiles(self.segments("q", q), self.segments("kv", kv))

    def own(self, what: str, rank: int) -> Slot:
        """A rank's own rows, as the slot every plan starts with."""
        layout = self.kv_layout if what == "kv" else self.q_layout
        return Slot(what, "qd" if what == "q" and self.backward else what, (Piece(rank, 0, layout.length(rank)),))


Builder = Callable[[Problem, int], tuple[Step, ...]]


@dataclass(frozen=True)
class Plan:
    """A schedule applied to one mask, layout and shape: immutable, hashable, the same on every rank.

    `steps(rank)` builds one rank's steps; everything else reads them.
    """

    schedule: str
    problem: Problem
    shape: AttentionShape
    builder: Builder = field(repr=False)
    why: str = ""
    partial_dtype: torch.dtype | None = None
    """Dtype of partial gradients that are returned straight; None: the input's."""

    @property
    def direction(self) -> str:
        return self.problem.direction

    @property
    def world(self) -> int:
        return self.problem.world

    def steps(self, rank: int) -> tuple[Step, ...]:
        """The steps of one rank."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank is {rank}; this plan has ranks 0 to {self.world - 1}")
        return _steps(self.builder, self.problem, rank)

    def bytes_sent(self, source: int, destination: int | None = None) -> int:
        """Exact payload bytes that `source` sends, to one rank or in all."""
        return sum(
            self.transfer_bytes(transfer)
            for step in self.steps(source)
            for lane in step.sends
            for transfer in lane
            if destination in (None, transfer.destination)
        )

    def transfer_bytes(self, transfer: Transfer) -> int:
        """Payload bytes of one transfer."""
        return transfer.rows * self.shape.row_bytes(transfer.what, self.partial_dtype)

    def check(self) -> Report:
        """Prove the plan: every allowed pair computed once, transfers paired and held, partials merged once, no deadlock.

        Raises PlanError that names what is wrong; returns counts otherwise.
        """
        from tokenring.check import check

        return check(self)

    def explain(self) -> str:
        """A table of steps, bytes and tiles per rank, and why the schedule was chosen."""
        lines = [
            f"schedule {self.schedule} ({self.direction}), {self.world} ranks" + (f": {self.why}" if self.why else "")
        ]
        lines.append(
            f"{'rank':>4} {'steps':>5} {'messages':>8} {'bytes sent':>12} {'tiles':>5} {'pairs':>14}   by destination"
        )
        for rank in range(self.world):
            steps = self.steps(rank)
            sends = [t for step in steps for lane in step.sends for t in lane]
            tiles = [tile for step in steps for compute in step.computes for tile in compute.tiles]
            to = {d: self.bytes_sent(rank, d) for d in sorted({t.destination for t in sends})}
            lines.append(
                f"{rank:>4} {len(steps):>5} {len(sends):>8} {sum(to.values()):>12} {len(tiles):>5} "
                f"{sum(t.pairs() for t in tiles):>14}   {', '.join(f'{d}: {b}' for d, b in to.items()) or '-'}"
            )
        return "\n".join(lines)


@lru_cache(maxsize=4096)
def _steps(builder: Any, problem: Problem, rank: int) -> tuple[Step, ...]:
    return builder(problem, rank)


def pieces(owner: int, ranges: Iterable[Range]) -> tuple[Piece, ...]:
    """Row ranges of one owner, as pieces."""
    return tuple(Piece(owner, start, stop) for start, stop in ranges if start < stop)

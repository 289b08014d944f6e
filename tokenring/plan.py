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
    """Rows that a rank holds under one name: queries ("q"), keys and values ("kv"), or a partial ("out": out and lse)."""

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
    """Tiles of a query slot against a key slot; the result is a partial for exactly the query rows in `out.pieces`."""

    q: str
    kv: str
    out: Slot
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank does in one step. `sends[lane]`, `receives[lane]`; `slots` are those that the receives fill."""

    sends: tuple[tuple[Transfer, ...], tuple[Transfer, ...]] = ((), ())
    receives: tuple[tuple[Transfer, ...], tuple[Transfer, ...]] = ((), ())
    slots: tuple[Slot, ...] = ()
    computes: tuple[Compute, ...] = ()
    merges: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Global shape of one attention call: lengths over all ranks, heads, head dims, dtype of q, k, v and out."""

    batch: int
    q_length: int
    kv_length: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        v_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
        if min(self.batch, self.q_heads, self.kv_heads, self.head_dim, v_dim) < 1 or self.q_heads % self.kv_heads:
            raise ValueError(
                f"AttentionShape got batch={self.batch}, q_heads={self.q_heads}, kv_heads={self.kv_heads}, "
                f"head_dim={self.head_dim}, v_head_dim={self.v_head_dim}; "
                "all must be 1 or more and q_heads a multiple of kv_heads"
            )
        if min(self.q_length, self.kv_length) < 0 or not self.dtype.is_floating_point:
            raise ValueError(
                f"AttentionShape got q_length={self.q_length}, kv_length={self.kv_length}, dtype={self.dtype}; "
                "lengths must be 0 or more, the dtype a floating one"
            )

    def row_bytes(self, what: str) -> int:
        """Bytes of one row of all batch entries on the wire: "q", "kv", or "out" (out in the input's dtype, lse float32)."""
        size = self.dtype.itemsize
        v_dim = self.head_dim if self.v_head_dim is None else self.v_head_dim
        if what == "q":
            return self.batch * self.q_heads * self.head_dim * size
        if what == "kv":
            return self.batch * self.kv_heads * (self.head_dim + v_dim) * size
        assert what == "out"
        lse_size = 8 if self.dtype == torch.float64 else 4
        return self.batch * self.q_heads * (v_dim * size + lse_size)


@dataclass(frozen=True)
class Problem:
    """What a schedule is given: who holds which positions, and which pairs count."""

    world: int
    q_layout: Layout
    kv_layout: Layout
    mask: Mask

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
        return Slot(what, what, (Piece(rank, 0, layout.length(rank)),))


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
    direction: str = "forward"

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
            transfer.rows * self.shape.row_bytes(transfer.what)
            for step in self.steps(source)
            for lane in step.sends
            for transfer in lane
            if destination in (None, transfer.destination)
        )

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

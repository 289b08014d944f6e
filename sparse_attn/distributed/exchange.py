"""Uneven exchanges as Plans: what the ranks have agreed to send one another, as data that tokenring's executor runs.

    halo     pieces of the keys' own shards, all heads, known from geometry and layout alone
    rows     rank s sends counts[s][d] rows of a packed list to rank d, in the order of destinations; they arrive in the order
             of sources. The counts are known to all ranks, so each of them holds the same Plan

`plan.check()` proves them, `plan.bytes_sent` counts them, `plan.simulate` times them. They compute nothing: their mask has no
pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.distributed.cut import Cut
from tokenring import AttentionShape, Layout, Mask, Plan, executor
from tokenring.plans.problem import Problem
from tokenring.plans.step import PAYLOAD_LANE, Piece, Slot, Step, Transfer
from tokenring.segments import Range, Segment, Tile
from tokenring.transport import Transport
from tokenring.work import Part, Tensors, Work

Counts = tuple[tuple[int, ...], ...]
"""counts[source][destination]; nothing on the diagonal."""

NOTHING = Mask(())
"""A mask without pairs."""


@dataclass(frozen=True)
class HaloSteps:
    """One step: every rank gets the keys and values that its anchor regions need of other shards."""

    cut: Cut

    def __call__(self, problem: Problem, rank: int) -> tuple[Step, ...]:
        halos = self.cut.halos
        sends = [_transfer("kv", rank, d, _of(halo, rank)) for d, halo in enumerate(halos) if d != rank]
        receives = [_transfer("kv", s, rank, _of(halos[rank], s)) for s in range(problem.world) if s != rank]
        return (_step("kv", sends, receives, halos[rank]),)


@dataclass(frozen=True)
class RowSteps:
    """One step: packed rows of kind `what` go to their destinations."""

    counts: Counts
    what: str
    lane: int = PAYLOAD_LANE

    def __call__(self, problem: Problem, rank: int) -> tuple[Step, ...]:
        ranks = range(problem.world)
        sends = [_transfer(self.what, rank, d, (self._piece(rank, d),)) for d in ranks]
        arriving = tuple(self._piece(s, rank) for s in ranks if self.counts[s][rank])
        receives = [_transfer(self.what, piece.owner, rank, (piece,)) for piece in arriving]
        return (_step(self.what, sends, receives, arriving, self.lane),)

    def _piece(self, source: int, destination: int) -> Piece:
        first = sum(self.counts[source][:destination])
        return Piece(source, first, first + self.counts[source][destination])


def _of(halo: Sequence[Piece], owner: int) -> tuple[Piece, ...]:
    return tuple(piece for piece in halo if piece.owner == owner)


def _transfer(what: str, source: int, destination: int, pieces: tuple[Piece, ...]) -> Transfer:
    return Transfer(source, destination, what, pieces, what, f"{what}:arrived")


def _step(
    what: str, sends: list[Transfer], receives: list[Transfer], arriving: tuple[Piece, ...], lane: int = PAYLOAD_LANE
) -> Step:
    before: tuple[tuple[Transfer, ...], ...] = ((),) * lane
    out, into = (tuple(t for t in side if t.rows) for side in (sends, receives))
    return Step((*before, out), (*before, into), (Slot(f"{what}:arrived", what, arriving),) if arriving else ())


def halo_plan(cut: Cut, shape: AttentionShape) -> Plan:
    """Keys and values that anchor regions need, in the rows and heads of the shards themselves."""
    problem = Problem(cut.world, cut.layout, cut.kv_layout, NOTHING, "forward", shape.q_heads, shape.kv_heads)
    return Plan("anchor:halo", problem, shape, HaloSteps(cut), "neighbours' rows of the anchor regions")


def row_plan(
    name: str,
    counts: Counts,
    dtype: torch.dtype,
    dim: int,
    v_dim: int | None = None,
    *,
    direction: str = "forward",
    lane: int = PAYLOAD_LANE,
) -> Plan:
    """counts[s][d] packed rows of `dim` numbers, and of `v_dim` beside them where given."""
    layout = packed(tuple(map(sum, counts)))
    problem = Problem(len(counts), layout, layout, NOTHING, direction)
    shape = AttentionShape(1, layout.total, layout.total, 1, 1, dim, v_dim, dtype)
    return Plan(f"anchor:{name}", problem, shape, RowSteps(counts, "q" if v_dim is None else "kv", lane))


def packed(rows: Sequence[int]) -> Layout:
    """Rank r holds the next rows[r] numbers."""
    runs, first = [], 0
    for count in rows:
        runs.append([Segment(first, count)] if count else [])
        first += count
    return Layout.of_any_runs(runs)


def mirrored(counts: Counts) -> Counts:
    """What goes back the way it came."""
    return tuple(zip(*counts))


class _Rows(Work):
    """Tensors that only move: (1, rows, 1, numbers) packed, or (B, rows, H, D) of a shard."""

    def __init__(self, what: str, tensors: Tensors) -> None:
        self.inputs = {what: tensors}
        self.arrived = tuple(t[:, :0] for t in tensors)

    def allocate(self, slot: Slot) -> Tensors:
        mine = self.inputs[slot.what]
        self.arrived = tuple(t.new_empty(t.shape[0], slot.rows, *t.shape[2:]) for t in mine)
        return self.arrived

    def on_wire(self, what: str, tensors: Tensors) -> Tensors:
        return tensors

    def result(self) -> Tensors:
        return self.arrived

    def compute(self, q: Tensors, kv: Tensors, tiles: Sequence[Tile]) -> list[tuple[int, Tensors]]:
        raise AssertionError("an exchange computes nothing")

    def sum(self, target: Slot, parts: Sequence[Part]) -> Tensors:
        raise AssertionError("an exchange sums nothing")

    def merge(self, tensors: Tensors, slot: Slot, ranges: Sequence[Range]) -> None:
        raise AssertionError("an exchange merges nothing")


class Flight:
    """An exchange under way: what leaves has been handed over, and what arrives is asked for later."""

    def __init__(self, running: executor.Running, packed: bool) -> None:
        self.running, self.packed = running, packed

    def land(self) -> Tensors:
        """What has arrived; waits for it."""
        found = self.running.finish()
        return tuple(t[0, :, 0] for t in found) if self.packed else found


class Wire:
    """One call's exchanges over a transport: `plans` are those that ran, in the order they began."""

    def __init__(self, runtime: Transport) -> None:
        self.runtime, self.plans = runtime, []

    @property
    def bytes_sent(self) -> int:
        """Payload bytes that left this rank."""
        return sum(plan.bytes_sent(self.runtime.rank) for plan in self.plans)

    def begin(self, plan: Plan, tensors: Tensors, packed: bool = True) -> Flight:
        """Send what a plan says; what is computed before `land` hides what it takes."""
        self.plans.append(plan)
        if packed:
            tensors = tuple(t[None, :, None] for t in tensors)
        kind = "q" if len(tensors) == 1 else "kv"
        return Flight(executor.begin(plan, self.runtime, _Rows(kind, tensors)), packed)

    def rows(
        self, name: str, counts: Counts, *tensors: Tensor, direction: str = "forward", lane: int = PAYLOAD_LANE
    ) -> Flight:
        """Each (rows, numbers) tensor's rows come from all other ranks, in the order of sources."""
        dims = [t.shape[1] for t in tensors]
        return self.begin(row_plan(name, counts, tensors[0].dtype, *dims, direction=direction, lane=lane), tensors)

    def agreed(self, mine: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Counts:
        """Every rank's numbers, rank by rank. Counted as control, not payload."""
        note = torch.tensor(list(mine), dtype=dtype, device=device)
        table = self.runtime.all_gather(note, same_shape=True, control=True)
        return tuple(map(tuple, torch.stack(table).tolist()))

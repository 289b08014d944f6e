"""One rank's slots, step by step: the part of a plan's proof that needs no other rank (see `tokenring.checking.proof`).

held      a slot that is computed on, sent, summed or merged is held by then, is of the kind that is asked for, and has those
          rows and heads
once      a name is filled once: the next step's receives are posted before this step computes, and must not land under it
filled    what a step receives and copies fills every row and head of its slots, each once
whole     tiles lie inside their slots and are trimmed (a kernel gives every query a key); the partial holds their queries
used      every row and head of a partial is used once: sent on, copied, summed, or merged by the rank that owns it
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable

from tokenring.plans.plan import Plan
from tokenring.plans.problem import QUERY_KINDS, Problem
from tokenring.plans.step import (
    AHEAD_LANE,
    LANES,
    PAYLOAD_LANE,
    RETURN_LANE,
    Compute,
    Located,
    Piece,
    Slot,
    Step,
    Sum,
    Transfer,
)
from tokenring.segments import Range, rows_in, union

RESULT_KINDS = ("out", "dq", "dkv")

Region = tuple[tuple[Range, ...], Range | None]


class PlanError(ValueError):
    """A plan breaks one of its rules. The message names rank, step and rule."""


def check_slots(plan: Plan, rank: int, steps: tuple[Step, ...]) -> None:
    """Play one rank's steps in the order of its program, or raise PlanError."""
    _Player(plan.problem, rank).play(steps)


class _Player:
    def __init__(self, problem: Problem, rank: int) -> None:
        self.problem, self.rank = problem, rank
        self.held: dict[str, Slot] = {what: problem.own(what, rank) for what in ("q", "kv")}
        self.names = set(self.held)
        self.used: defaultdict[str, list[Region]] = defaultdict(list)
        self.located: dict[int, tuple[Slot, Located]] = {}
        self.where = ""

    def play(self, steps: tuple[Step, ...]) -> None:
        for index, step in enumerate(steps):
            self.where = f"rank {self.rank}, step {index}"
            self._once(step)
            self._filled(step)
            self._leave((*step.copies, *step.sends[PAYLOAD_LANE], *step.sends[AHEAD_LANE]))
            self._arrive(step, (*step.copies, *step.receives[PAYLOAD_LANE], *step.receives[AHEAD_LANE]))
            for compute in step.computes:
                self._whole(compute)
            self.held.update({slot.name: slot for compute in step.computes for slot in compute.results})
            for total in step.sums:
                self._sum(total)
            self._leave(step.sends[RETURN_LANE])
            self._arrive(step, step.receives[RETURN_LANE])
            for name in step.merges:
                self._merge(name)
        for name, slot in self.held.items():
            if slot.what in RESULT_KINDS and not self._parted(slot, self.used[name]):
                raise PlanError(
                    f"rank {self.rank}: {name} is not used exactly once in every row and head; merged, summed or sent on "
                    f"are {self.used[name]} of {slot.rows} rows"
                )

    def _once(self, step: Step) -> None:
        made = [slot for compute in step.computes for slot in compute.results] + [s.target for s in step.sums]
        for slot in (*step.slots, *made):
            if slot.name in self.names:
                self._fail(f"slot {slot.name} is filled again; every filling needs a name of its own")
            self.names.add(slot.name)

    def _filled(self, step: Step) -> None:
        slots = {slot.name: slot for slot in step.slots}
        into: defaultdict[str, list[Region]] = defaultdict(list)
        lanes: defaultdict[str, set[int]] = defaultdict(set)
        for lane in LANES:
            for transfer in step.receives[lane]:
                into[transfer.destination_slot].append(self._rows(slots, transfer.destination_slot, transfer))
                lanes[transfer.destination_slot].add(lane)
        for transfer in step.copies:
            if (transfer.source, transfer.destination) != (self.rank, self.rank):
                self._fail(f"copies {transfer}, which is not from it to itself")
            into[transfer.destination_slot].append(self._rows(slots, transfer.destination_slot, transfer))
        for name, slot in slots.items():
            if not self._parted(slot, into[name]) or len(lanes[name]) > 1:
                self._fail(f"slot {name} has {slot.rows} rows; {into[name]} arrive on lanes {sorted(lanes[name])}")

    def _leave(self, transfers: Iterable[Transfer]) -> None:
        for transfer in transfers:
            region = self._rows(self.held, transfer.source_slot, transfer)
            self.used[transfer.source_slot].append(region)

    def _arrive(self, step: Step, transfers: Iterable[Transfer]) -> None:
        slots = {slot.name: slot for slot in step.slots}
        self.held.update({t.destination_slot: slots[t.destination_slot] for t in transfers})

    def _rows(self, slots: dict[str, Slot], name: str, transfer: Transfer) -> Region:
        if name not in slots:
            self._fail(f"{transfer} uses slot {name}; there are {sorted(slots)}")
        slot = slots[name]
        if slot.what != transfer.what or transfer.rows < 1:
            self._fail(f"{transfer} moves no rows, or slot {name} holds {slot.what}")
        heads = transfer.heads
        if heads is None and slot.heads is not None:
            self._fail(f"{transfer} moves all heads of slot {name}, which holds {slot.heads}; name them")
        if heads is not None and not (_within(heads, self._heads(slot)) and heads[0] < heads[1]):
            self._fail(f"{transfer} moves heads that slot {name} does not hold, or none: it has {self._heads(slot)}")
        return self._locate(slot, transfer.pieces), transfer.heads

    def _whole(self, compute: Compute) -> None:
        if compute.q not in self.held or compute.kv not in self.held:
            self._fail(f"computes on {compute.q} and {compute.kv}, holds {sorted(self.held)}")
        q, kv, heads = self.held[compute.q], self.held[compute.kv], compute.heads
        given = (" and ".join(result.what for result in compute.results), q.what, kv.what)
        allowed = ("dq and dkv", "qd", "kv") if self.problem.backward else ("out", "q", "kv")
        if given != allowed:
            self._fail("computes {} of {} and {}; it must be {} of {} and {}".format(*given, *allowed))
        q_rows, k_rows = q.rows, kv.rows
        for tile in compute.tiles:
            inside = tile.q_start >= 0 and tile.q_stop <= q_rows and tile.k_start >= 0 and tile.k_stop <= k_rows
            if not inside or tile.trim() != tile:
                self._fail(f"{tile} is not trimmed, or not inside {q_rows} query and {k_rows} key rows")
        self._grouped(compute, q, kv)
        rows = [(q, union((t.q_start, t.q_stop) for t in compute.tiles), heads)]
        rows.append((kv, union((t.k_start, t.k_stop) for t in compute.tiles), self.problem.key_heads(heads)))
        for result, (slot, wanted, some) in zip(compute.results, rows):
            located = union(self._locate(slot, result.pieces))
            if not wanted or located != wanted or rows_in(wanted) != result.rows or result.heads != some:
                self._fail(f"partial {result.name} does not hold the rows {wanted} and heads {some} of its tiles")

    def _grouped(self, compute: Compute, q: Slot, kv: Slot) -> None:
        """Query heads of one key head, or whole groups of them; both slots hold the heads."""
        heads = compute.heads or self._heads(q)
        keys, group = self.problem.key_heads(heads), self.problem.q_heads // self.problem.kv_heads
        grouped = heads[0] < heads[1] and (keys[1] - keys[0] == 1 or heads[0] % group == heads[1] % group == 0)
        if not grouped or not _within(heads, self._heads(q)) or not _within(keys, self._heads(kv)):
            self._fail(f"computes query heads {heads} of {self._heads(q)} with key heads {keys} of {self._heads(kv)}")
        if compute.heads is None and (q.heads, kv.heads) != (None, None):
            self._fail(f"computes all heads of {q.name} and {kv.name}, which hold some; name them")

    def _sum(self, total: Sum) -> None:
        missing = [name for name in total.sources if name not in self.held]
        if not total.sources or total.target.rows < 1:
            self._fail(f"sums nothing into {total.target.name}")
        if missing:
            self._fail(f"sums {missing[0]}, holds {sorted(self.held)}")
        sources = [self.held[name] for name in total.sources]
        if any((s.what, s.heads) != (total.target.what, total.target.heads) for s in sources):
            self._fail(f"sums {total.sources} of unlike kinds or heads into {total.target.name}")
        rows = union(r for s in sources for r in self._locate(total.target, s.pieces))
        if rows_in(rows) != total.target.rows:
            self._fail(f"the sum {total.target.name} has {total.target.rows} rows; its sources have {rows_in(rows)}")
        for source in sources:
            self.used[source.name].append((((0, source.rows),), source.heads))
        self.held[total.target.name] = total.target

    def _merge(self, name: str) -> None:
        if name not in self.held:
            self._fail(f"merges {name}, holds {sorted(self.held)}")
        slot = self.held[name]
        if slot.what not in RESULT_KINDS or any(p.owner != self.rank for p in slot.pieces):
            self._fail(f"merges {name}, which holds {slot.what} of ranks {sorted({p.owner for p in slot.pieces})}")
        self.used[name].append((((0, slot.rows),), slot.heads))

    def _heads(self, slot: Slot) -> Range:
        if slot.heads is not None:
            return slot.heads
        return 0, self.problem.q_heads if slot.what in QUERY_KINDS else self.problem.kv_heads

    def _parted(self, slot: Slot, regions: list[Region]) -> bool:
        """Whether the regions are the slot's rows x heads, each once."""
        whole, wanted = self._heads(slot), slot.rows
        edges = sorted({*whole, *(edge for _, heads in regions if heads is not None for edge in heads)})
        for first, last in itertools.pairwise(edges):
            ranges = [r for rows, heads in regions if heads is None or _within((first, last), heads) for r in rows]
            if rows_in(ranges) != wanted or rows_in(union(ranges)) != wanted:
                return False
        return (edges[0], edges[-1]) == whole

    def _locate(self, slot: Slot, pieces: tuple[Piece, ...]) -> tuple[Range, ...]:
        # By identity, beside the slot, which so stays alive: a workspace has as many pieces as transfers that fill it.
        if id(slot) not in self.located:
            self.located[id(slot)] = slot, Located(slot)
        try:
            return self.located[id(slot)][1].rows(pieces)
        except ValueError as error:
            raise PlanError(f"{self.where}: {error}") from error

    def _fail(self, message: str) -> None:
        raise PlanError(f"{self.where}: {message}")


def _within(inner: Range, outer: Range) -> bool:
    return outer[0] <= inner[0] <= inner[1] <= outer[1]

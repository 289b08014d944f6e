"""One rank's slots, step by step: the part of a plan's proof that needs no other rank (see `tokenring.check`).

held      a slot that is computed on, sent or merged is held by then, is of the kind that is asked for, and has those rows
once      a name is filled once: the next step's receives are posted before this step computes, and must not land under it
filled    what a step receives fills every row of its slots, each row once
whole     tiles lie inside their slots and are trimmed (a kernel gives every query a key); the partial holds their queries
"""

from __future__ import annotations

from tokenring.plan import PAYLOAD_LANE, RETURN_LANE, Compute, Piece, Plan, Problem, Slot, Step, Transfer
from tokenring.segments import Range, rows_in, union

LANES = (PAYLOAD_LANE, RETURN_LANE)


class PlanError(ValueError):
    """A plan breaks one of its rules. The message names rank, step and rule."""


def check_slots(plan: Plan, rank: int, steps: tuple[Step, ...]) -> None:
    """Play one rank's steps in the executor's order, or raise PlanError."""
    held: dict[str, Slot] = {what: plan.problem.own(what, rank) for what in ("q", "kv")}
    names = set(held)
    flying: list[Slot] = []
    for index, step in enumerate(steps):
        where = f"rank {rank}, step {index}"
        _once(step, names, where)
        for compute in step.computes:
            _whole(compute, held, plan.problem, where)
        _locate(held, step.sends[PAYLOAD_LANE], "source_slot", where)
        held.update({slot.name: slot for compute in step.computes for slot in compute.results})
        _locate(held, step.sends[RETURN_LANE], "source_slot", where)
        held.update({slot.name: slot for slot in flying})
        for name in step.merges:
            if name not in held:
                raise PlanError(f"{where}: merges {name}, holds {sorted(held)}")
        slots = {slot.name: slot for slot in step.slots}
        for lane in LANES:
            _locate(slots, step.receives[lane], "destination_slot", where)
        _filled(slots, step, where)
        held.update({t.destination_slot: slots[t.destination_slot] for t in step.receives[PAYLOAD_LANE]})
        flying = [slots[t.destination_slot] for t in step.receives[RETURN_LANE]]


def _once(step: Step, names: set[str], where: str) -> None:
    for slot in (*step.slots, *(result for compute in step.computes for result in compute.results)):
        if slot.name in names:
            raise PlanError(f"{where}: slot {slot.name} is filled again; every filling needs a name of its own")
        names.add(slot.name)


def _whole(compute: Compute, held: dict[str, Slot], problem: Problem, where: str) -> None:
    if compute.q not in held or compute.kv not in held:
        raise PlanError(f"{where}: computes on {compute.q} and {compute.kv}, holds {sorted(held)}")
    q, kv = held[compute.q], held[compute.kv]
    given = (" and ".join(result.what for result in compute.results), q.what, kv.what)
    allowed = ("dq and dkv", "qd", "kv") if problem.backward else ("out", "q", "kv")
    if given != allowed:
        raise PlanError("{}: computes {} of {} and {}; it must be {} of {} and {}".format(where, *given, *allowed))
    for tile in compute.tiles:
        inside = tile.q_start >= 0 and tile.q_stop <= q.rows and tile.k_start >= 0 and tile.k_stop <= kv.rows
        if not inside or tile.trim() != tile:
            raise PlanError(f"{where}: {tile} is not trimmed, or not inside {q.rows} query and {kv.rows} key rows")
    rows = [(q, union((t.q_start, t.q_stop) for t in compute.tiles), "query")]
    rows.append((kv, union((t.k_start, t.k_stop) for t in compute.tiles), "key"))
    for result, (slot, wanted, side) in zip(compute.results, rows):
        if not wanted or union(_rows(slot, result.pieces, where)) != wanted or rows_in(wanted) != result.rows:
            raise PlanError(f"{where}: partial {result.name} does not hold the {side} rows {wanted} of its tiles")


def _locate(held: dict[str, Slot], transfers: tuple[Transfer, ...], end: str, where: str) -> None:
    for transfer in transfers:
        name = getattr(transfer, end)
        if name not in held:
            raise PlanError(f"{where}: {transfer} uses slot {name}; there are {sorted(held)}")
        if held[name].what != transfer.what or transfer.rows < 1:
            raise PlanError(f"{where}: {transfer} moves no rows, or slot {name} holds {held[name].what}")
        _rows(held[name], transfer.pieces, where)


def _filled(slots: dict[str, Slot], step: Step, where: str) -> None:
    for name, slot in slots.items():
        arriving = [t for lane in LANES for t in step.receives[lane] if t.destination_slot == name]
        ranges = [r for t in arriving for r in _rows(slot, t.pieces, where)]
        if rows_in(ranges) != slot.rows or rows_in(union(ranges)) != slot.rows:
            raise PlanError(
                f"{where}: slot {name} has {slot.rows} rows; {rows_in(ranges)} arrive, for {rows_in(union(ranges))} of them"
            )


def _rows(slot: Slot, pieces: tuple[Piece, ...], where: str) -> tuple[Range, ...]:
    try:
        return slot.locate(pieces)
    except ValueError as error:
        raise PlanError(f"{where}: {error}") from error

"""Proofs of plans: each way to damage a plan, and the rule that finds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

import tokenring as tr
from tokenring.checking.proof import PlanError
from tokenring.plans.plan import Plan
from tokenring.plans.problem import Problem
from tokenring.plans.step import Piece, Slot, Step, Sum, Transfer
from tokenring.segments import Tile

Transfers = tuple[Transfer, ...]


def plan_of(schedule: str, mask: str) -> Plan:
    return tr.plan(schedule, world=4, shape=tr.AttentionShape(2, 64, 64, 8, 2, 16), layout="zigzag", mask=mask)


def damaged(schedule: str, mask: str, change: Callable[[list[Step], int], list[Step]]) -> Plan:
    plan = plan_of(schedule, mask)

    def builder(problem: Problem, rank: int) -> tuple[Step, ...]:
        return tuple(change(list(plan.builder(problem, rank)), rank))

    return replace(plan, builder=builder)


def with_first_compute(steps: list[Step], **changes: object) -> list[Step]:
    return [replace(steps[0], computes=(replace(steps[0].computes[0], **changes),)), *steps[1:]]


def with_first_transfers(steps: list[Step], sent: Callable, received: Callable) -> list[Step]:
    first = steps[0]
    return [replace(first, sends=(sent(first.sends[0]), ()), receives=(received(first.receives[0]), ())), *steps[1:]]


def halves(transfers: Transfers) -> list[list[Transfer]]:
    cut = []
    for t in transfers:
        p = t.pieces[0]
        middle = p.start + p.rows // 2
        parts = ((Piece(p.owner, p.start, middle),), (Piece(p.owner, middle, p.stop), *t.pieces[1:]))
        cut.append([replace(t, pieces=part) for part in parts])
    return cut


def in_halves(transfers: Transfers) -> Transfers:
    return tuple(t for pair in halves(transfers) for t in pair)


def in_halves_turned_round(transfers: Transfers) -> Transfers:
    return tuple(t for pair in halves(transfers) for t in reversed(pair))


def first_half_twice(transfers: Transfers) -> Transfers:
    return tuple(pair[0] for pair in halves(transfers) for _ in range(2))


def renamed(transfers: Transfers) -> Transfers:
    return tuple(replace(t, what="q") for t in transfers)


def and_nothing(transfers: Transfers) -> Transfers:
    return (*transfers, *(replace(t, pieces=()) for t in transfers))


def reuse_one_name(steps: list[Step], rank: int) -> list[Step]:
    """One buffer for what is computed on and what arrives beside it."""

    def name(old: str) -> str:
        return "kv" if old == "kv" else "buffer"

    def moved(lanes: tuple[Transfers, Transfers]) -> tuple[Transfers, Transfers]:
        kv = (replace(t, source_slot=name(t.source_slot), destination_slot=name(t.destination_slot)) for t in lanes[0])
        return tuple(kv), lanes[1]

    return [
        replace(
            step,
            sends=moved(step.sends),
            receives=moved(step.receives),
            slots=tuple(replace(slot, name="buffer") for slot in step.slots),
            computes=tuple(replace(c, kv=name(c.kv)) for c in step.computes),
        )
        for step in steps
    ]


def other_rows(steps: list[Step], rank: int) -> list[Step]:
    """The late half of the queries attends, and its partial claims to be the early half."""
    for index, step in enumerate(steps):
        for compute in step.computes:
            if compute.results[0].pieces == (Piece(rank, 8, 16),):
                wrong = replace(compute, results=(Slot(compute.results[0].name, "out", (Piece(rank, 0, 8),)),))
                return [*steps[:index], replace(step, computes=(wrong,)), *steps[index + 1 :]]
    return steps


def transfers_changed(sent: Callable, received: Callable) -> Callable:
    return lambda steps, rank: with_first_transfers(steps, sent, received)


DAMAGE = {
    "tile outside its slot": (
        "ring",
        lambda steps, rank: with_first_compute(steps, tiles=(Tile(0, 16, 0, 21),)),
        "not inside 16 query and 16 key rows",
    ),
    "tile with queries that see no key": (
        "ring",
        lambda steps, rank: with_first_compute(steps, tiles=(Tile(0, 16, 4, 16, upper=0),)),
        "is not trimmed",
    ),
    "no tiles": ("ring", lambda steps, rank: with_first_compute(steps, tiles=()), "does not hold the rows"),
    "rows lost": (
        "ring",
        lambda steps, rank: with_first_compute(steps, results=(Slot("out0", "out", (Piece(rank, 0, 7),)),)),
        "does not hold the rows",
    ),
    "queries as keys": ("ring", lambda steps, rank: with_first_compute(steps, kv="q"), "must be out of q and kv"),
    "order turned round": ("gather", transfers_changed(in_halves, in_halves_turned_round), "in another order"),
    "half sent twice": (
        "gather",
        transfers_changed(first_half_twice, first_half_twice),
        "has 48 rows; .* arrive on lanes",
    ),
    "wrong kind": ("ring", transfers_changed(renamed, renamed), "or slot kv1 holds kv"),
    "nothing sent": ("ring", transfers_changed(and_nothing, and_nothing), "moves no rows"),
    "name filled again": ("ring", reuse_one_name, "slot buffer is filled again"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_check_finds_damage_to_slots_tiles_and_order(name: str) -> None:
    schedule, change, message = DAMAGE[name]
    with pytest.raises(PlanError, match=message):
        damaged(schedule, "full", change).check()


def test_check_finds_a_partial_that_names_other_queries() -> None:
    with pytest.raises(PlanError, match="does not hold the rows"):
        damaged("ring", "causal", other_rows).check()


def test_halves_in_one_order_are_a_good_plan() -> None:
    plan = damaged("gather", "full", transfers_changed(in_halves, in_halves))
    assert plan.check().transfers == 2 * plan_of("gather", "full").check().transfers


def test_check_finds_heads_that_nobody_named_or_that_are_none() -> None:
    shape = tr.AttentionShape(2, 64, 64, 8, 4, 16)
    plan = tr.plan("ulysses", world=4, shape=shape, layout="zigzag", mask="full")

    def with_heads(heads: tuple | None) -> Plan:
        def builder(problem: Problem, rank: int) -> tuple[Step, ...]:
            first, *rest = plan.builder(problem, rank)
            changed = [tuple(replace(t, heads=heads) for t in side[0]) for side in (first.sends, first.receives)]
            return (replace(first, sends=(changed[0],), receives=(changed[1],)), *rest)

        return replace(plan, builder=builder)

    for heads, message in ((None, "name them"), ((0, 0), "or none"), ((2, 9), "does not hold")):
        with pytest.raises(PlanError, match=message):
            with_heads(heads).check()


def test_check_finds_tiles_of_some_batch_entries_and_empty_sums() -> None:
    def first_entry(steps: list[Step], rank: int) -> list[Step]:
        return with_first_compute(steps, tiles=tuple(t.of((0, 1)) for t in steps[0].computes[0].tiles))

    def empty_sum(steps: list[Step], rank: int) -> list[Step]:
        return [replace(steps[0], sums=(Sum(Slot("nothing", "out", ()), ()),)), *steps[1:]]

    with pytest.raises(PlanError, match="allowed pairs are never computed"):
        damaged("ring", "full", first_entry).check()
    with pytest.raises(PlanError, match="sums nothing into nothing"):
        damaged("ring", "full", empty_sum).check()

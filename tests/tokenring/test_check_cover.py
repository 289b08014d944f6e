"""The proof of coverage beside counting every pair: the same verdict on every damaged plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as with_settings
from hypothesis import strategies as st

import tokenring as tr
from tests.tokenring.every_schedule import layouts, masks, schedule_names
from tokenring.checking.cover import check_covered
from tokenring.checking.proof import PlanError
from tokenring.checking.sweep import first_overlap
from tokenring.plans.step import Compute, Slot, Step
from tokenring.segments import Tile

LENGTH, BATCH = 17, 2
BOUND = st.none() | st.integers(-6, 6)
TILES = st.lists(
    st.builds(
        lambda q, rows, k, keys, lower, upper: Tile(q, q + rows, k, k + keys, lower, upper).trim(),
        *(st.integers(0, 9), st.integers(1, 5)) * 2,
        BOUND,
        BOUND,
    ).filter(bool),
    max_size=6,
)


def pairs_of(tile: Tile) -> set[tuple[int, int]]:
    dense = tr.Mask.band(tile.lower, tile.upper).dense(
        torch.arange(tile.q_start, tile.q_stop), torch.arange(tile.k_start, tile.k_stop)
    )
    return {(q + tile.q_start, k + tile.k_start) for q, k in dense.nonzero().tolist()}


@given(TILES)
@with_settings(max_examples=500)
def test_two_tiles_that_share_a_pair_are_found_and_no_others(tiles: list[Tile]) -> None:
    held = [pairs_of(tile) for tile in tiles]
    shared = any(held[i] & held[j] for i in range(len(held)) for j in range(i))
    found = first_overlap(tiles)
    assert (found is not None) == shared
    if found is not None:
        assert pairs_of(found[0]) & pairs_of(found[1])


def times_computed(plan: tr.Plan, steps: list[tuple[Step, ...]]) -> torch.Tensor:
    """(heads, batch, queries, keys): how often each pair is computed, by filling a matrix."""
    problem, shape = plan.problem, plan.shape
    found = torch.zeros(shape.q_heads, shape.batch, LENGTH, LENGTH, dtype=torch.int64)
    for rank, mine in enumerate(steps):
        slots = {what: problem.own(what, rank) for what in ("q", "kv")}
        slots |= {slot.name: slot for step in mine for slot in step.slots}
        for compute in (c for step in mine for c in step.computes):
            q, k = positions(plan, "q", slots[compute.q]), positions(plan, "kv", slots[compute.kv])
            heads = slice(*(compute.heads or (0, shape.q_heads)))
            for tile in compute.tiles:
                batch = slice(*(tile.batch or (0, shape.batch)))
                for i, j in pairs_of(tile):
                    found[heads, batch, q[i], k[j]] += 1
    return found


def positions(plan: tr.Plan, what: str, slot: Slot) -> list[int]:
    layout = plan.problem.layout(what)
    held = [layout.positions(rank).tolist() for rank in range(plan.world)]
    return [position for piece in slot.pieces for position in held[piece.owner][piece.start : piece.stop]]


def damaged(draw: st.DrawFn, compute: Compute) -> list[Compute]:
    """One tile moved, cut, widened, dropped or doubled; or the heads changed; or all of it done twice."""
    tiles = list(compute.tiles)
    index = draw(st.integers(0, len(tiles) - 1))
    tile = tiles[index]
    kind = draw(
        st.sampled_from(["drop", "double", "unbound", "later keys", "fewer rows", "entries", "twice", "heads", "none"])
    )
    if kind == "twice":
        return [compute, compute]
    if kind == "heads":
        return [replace(compute, heads=draw(st.sampled_from([None, (0, 1), (1, 2)])))]
    changed = {
        "drop": [],
        "double": [tile, tile],
        "unbound": [replace(tile, lower=None, upper=None)],
        "later keys": [replace(tile, k_start=max(0, tile.k_start - 1), k_stop=max(1, tile.k_stop - 1)).trim()],
        "fewer rows": [replace(tile, q_stop=tile.q_stop - 1).trim()],
        "entries": [tile.of((0, 1))],
        "none": [tile],
    }[kind]
    tiles[index : index + 1] = [t for t in changed if t]
    return [replace(compute, tiles=tuple(tiles))]


@given(st.data())
@with_settings(max_examples=300, deadline=None)
def test_a_damaged_plan_is_proven_if_and_only_if_every_allowed_pair_is_computed_once(data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 4))
    kinds = masks(LENGTH, BATCH)
    mask = kinds[data.draw(st.sampled_from(sorted(kinds)))]
    layout = data.draw(st.sampled_from(layouts(LENGTH, world)))
    name = data.draw(st.sampled_from(schedule_names(world)))
    shape = tr.AttentionShape(BATCH, LENGTH, LENGTH, 2, 1, 4)
    plan = tr.plan(name, world=world, shape=shape, layout=layout, mask=mask)
    steps = [list(plan.steps(rank)) for rank in range(world)]
    places = [
        (rank, i, j)
        for rank in range(world)
        for i, step in enumerate(steps[rank])
        for j, compute in enumerate(step.computes)
        if compute.tiles
    ]
    if places:
        rank, i, j = data.draw(st.sampled_from(places))
        computes = list(steps[rank][i].computes)
        computes[j : j + 1] = damaged(data.draw, computes[j])
        steps[rank][i] = replace(steps[rank][i], computes=tuple(computes))
    here = torch.arange(LENGTH)
    allowed = mask.dense(here, here).expand(shape.q_heads, BATCH, LENGTH, LENGTH).long()
    good = torch.equal(times_computed(plan, [tuple(mine) for mine in steps]), allowed)
    if good:
        assert check_covered(plan, [tuple(mine) for mine in steps]) == int(mask.dense(here, here).sum())
    else:
        with pytest.raises(PlanError, match=r"computed twice|never computed|the mask forbids"):
            check_covered(plan, [tuple(mine) for mine in steps])


def test_a_layout_that_holds_a_position_twice_is_refused() -> None:
    from tokenring.segments import Segment

    twice = tr.Layout(4, 2, 0, ((Segment(0, 2),), (Segment(1, 2),)), "own")
    plan = tr.plan("ring", world=2, shape=tr.AttentionShape(1, 4, 4, 1, 1, 4), layout=twice, mask="full")
    with pytest.raises(PlanError, match="the layout own holds some position twice or not at all"):
        plan.check()

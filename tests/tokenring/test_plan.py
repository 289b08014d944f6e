"""Plans: exact bytes, and proofs that fail when a plan is damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as with_settings
from hypothesis import strategies as st

import tokenring as tr
from tokenring.checking.live import check_live
from tokenring.checking.proof import PlanError
from tokenring.plans.plan import Plan
from tokenring.plans.problem import Problem
from tokenring.plans.step import Step
from tokenring.segments import Segment, Tile, band_tile, fuse, union

BATCH, HEADS, KV_HEADS, DIM, WORLD, LENGTH = 2, 8, 2, 16, 4, 64
Q = BATCH * (LENGTH // WORLD) * HEADS * DIM * 2
KV = 2 * BATCH * (LENGTH // WORLD) * KV_HEADS * DIM * 2
LSE = BATCH * (LENGTH // WORLD) * HEADS * 4


def plan_of(schedule: str, mask: str, layout: str = "zigzag", world: int = WORLD) -> Plan:
    shape = tr.AttentionShape(BATCH, LENGTH, LENGTH, HEADS, KV_HEADS, DIM)
    return tr.plan(schedule, world=world, shape=shape, layout=layout, mask=mask)


def test_full_mask_bytes_equal_the_closed_formulas() -> None:
    for rank in range(WORLD):
        assert plan_of("ring", "full").bytes_sent(rank) == (WORLD - 1) * KV
        assert plan_of("gather", "full").bytes_sent(rank) == (WORLD - 1) * KV
        assert plan_of("tokenring", "full").bytes_sent(rank) == (WORLD - 1) * (2 * Q + LSE)


def test_full_mask_bytes_by_destination() -> None:
    ring, gather, tokenring = (plan_of(name, "full") for name in ("ring", "gather", "tokenring"))
    for rank in range(WORLD):
        assert ring.bytes_sent(rank, (rank + 1) % WORLD) == (WORLD - 1) * KV
        for hop in range(1, WORLD):
            peer = (rank - hop) % WORLD
            assert gather.bytes_sent(rank, peer) == KV
            queries = (WORLD - 1) * Q if peer == (rank + 1) % WORLD else 0
            assert tokenring.bytes_sent(rank, peer) == Q + LSE + queries


def test_the_both_way_ring_sends_half_each_way() -> None:
    plan = plan_of("biring", "full")
    for rank in range(WORLD):
        assert (
            plan.bytes_sent(rank, (rank + 1) % WORLD)
            == plan.bytes_sent(rank, (rank - 1) % WORLD)
            == (WORLD - 1) * KV // 2
        )


def test_causal_zigzag_sends_three_quarters_in_every_schedule() -> None:
    for name in ("ring", "biring", "gather", "tokenring"):
        causal, full = plan_of(name, "causal"), plan_of(name, "full")
        total = sum(causal.bytes_sent(r) for r in range(WORLD))
        assert total * 4 == 3 * sum(full.bytes_sent(r) for r in range(WORLD)), name


def test_causal_contiguous_sends_nothing_to_ranks_before_the_keys() -> None:
    for name in ("ring", "gather"):
        plan = plan_of(name, "causal", "contiguous")
        assert sum(plan.bytes_sent(r) for r in range(WORLD)) == KV * sum(range(WORLD))


def test_causal_zigzag_gives_every_rank_and_step_equal_work() -> None:
    for name in ("ring", "tokenring"):
        plan = plan_of(name, "causal")
        pairs = [
            [sum(t.pairs() for c in step.computes for t in c.tiles) for step in plan.steps(r)] for r in range(WORLD)
        ]
        assert {row[0] for row in pairs} == {pairs[0][0]}
        assert len({n for row in pairs for n in row[1:WORLD]}) == 1


def test_own_zigzag_rows_are_one_causal_tile_and_gather_fuses_what_others_sent() -> None:
    for name in ("ring", "tokenring", "gather"):
        for rank in range(WORLD):
            first = plan_of(name, "causal").steps(rank)[0].computes[0]
            assert first.tiles == (Tile(0, 16, 0, 16, upper=0),)
    assert len(plan_of("gather", "full").steps(1)[1].computes[0].tiles) == 1


def test_auto_takes_the_schedule_whose_busiest_rank_moves_least() -> None:
    many_keys = tr.AttentionShape(1, 8, 4096, 8, 8, 64)
    few_queries = tr.plan("auto", world=4, shape=many_keys, layout="zigzag", kv_layout="zigzag", mask="causal")
    assert few_queries.schedule == "tokenring"
    grouped = plan_of("auto", "full")
    assert grouped.schedule in ("ring", "gather")
    assert "bytes with tokenring" in grouped.why and grouped.why in grouped.explain()


def test_one_rank_sends_nothing() -> None:
    for name in ("ring", "tokenring", "gather"):
        plan = plan_of(name, "causal", world=1)
        assert plan.bytes_sent(0) == 0 and plan.check().transfers == 0


def test_plans_and_their_parts_are_values() -> None:
    assert plan_of("ring", "causal") == plan_of("ring", "causal")
    assert hash(plan_of("ring", "causal")) == hash(plan_of("ring", "causal"))
    assert plan_of("ring", "causal") != plan_of("ring", "full")


def damaged(schedule: str, change: Callable[[list[Step], int], list[Step]]) -> Plan:
    plan = plan_of(schedule, "causal")

    def builder(problem: Problem, rank: int) -> tuple[Step, ...]:
        return tuple(change(list(plan.builder(problem, rank)), rank))

    return replace(plan, builder=builder)


def drop_receive(steps: list[Step], rank: int) -> list[Step]:
    return [replace(steps[0], receives=((), ())), *steps[1:]] if rank == 2 else steps


def drop_compute(steps: list[Step], rank: int) -> list[Step]:
    return [*steps[:2], replace(steps[2], computes=(), merges=()), *steps[3:]] if rank == 1 else steps


def compute_twice(steps: list[Step], rank: int) -> list[Step]:
    first = steps[0].computes[0]
    again = replace(first, results=(replace(first.results[0], name="again"),))
    return (
        [replace(steps[0], computes=(first, again), merges=(first.results[0].name, "again")), *steps[1:]]
        if rank == 1
        else steps
    )


def forget_band(steps: list[Step], rank: int) -> list[Step]:
    first = steps[0].computes[0]
    open_tile = replace(first, tiles=tuple(replace(t, upper=None) for t in first.tiles))
    return [replace(steps[0], computes=(open_tile,)), *steps[1:]] if rank == 3 else steps


def merge_twice(steps: list[Step], rank: int) -> list[Step]:
    return [replace(steps[0], merges=steps[0].merges * 2), *steps[1:]] if rank == 0 else steps


def forget_merge(steps: list[Step], rank: int) -> list[Step]:
    return [replace(steps[0], merges=()), *steps[1:]] if rank == 0 else steps


def compute_early(steps: list[Step], rank: int) -> list[Step]:
    moved = replace(steps[0], computes=steps[0].computes + steps[2].computes)
    return [moved, steps[1], replace(steps[2], computes=()), *steps[3:]] if rank == 0 else steps


def turn_step_round(steps: list[Step], rank: int) -> list[Step]:
    return [steps[1], steps[0], *steps[2:]] if rank == 0 else steps


DAMAGE = {
    "receive dropped": (drop_receive, "sent but not received"),
    "compute dropped": (drop_compute, "never computed"),
    "computed twice": (compute_twice, "computed twice"),
    "band forgotten": (forget_band, "the mask forbids"),
    "merged twice": (merge_twice, "not used exactly once"),
    "merge forgotten": (forget_merge, "not used exactly once"),
    "computed before arrival": (compute_early, "computes on"),
    "steps swapped on one rank": (turn_step_round, "but not"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_finds(damage: str) -> None:
    change, message = DAMAGE[damage]
    with pytest.raises(PlanError, match=message):
        damaged("ring", change).check()


def test_check_finds_a_partial_that_never_goes_home() -> None:
    def keep(steps: list[Step], rank: int) -> list[Step]:
        def stays(step: Step, first: bool) -> Step:
            queries = tuple(x for x in step.slots if x.what == "q")
            return replace(
                step,
                sends=(step.sends[0], ()),
                receives=(step.receives[0], ()),
                slots=queries,
                merges=step.merges[:1] if first else (),
            )

        return [stays(step, index == 0) for index, step in enumerate(steps)]

    with pytest.raises(PlanError, match="not used exactly once"):
        damaged("tokenring", keep).check()


def test_check_finds_a_deadlock() -> None:
    """Rank r waits in step r for rank r+1, whose own step r lies behind a wait for rank r+2: a circle of waits."""
    shape = tr.AttentionShape(1, 6, 6, 2, 2, 8)
    plan = tr.plan("gather", world=3, shape=shape, layout="zigzag", mask="full")
    exchange = {r: plan.steps(r)[0] for r in range(3)}

    def builder(problem: Problem, rank: int) -> tuple[Step, ...]:
        def part(step: int) -> Step:
            pair = ({0, 1}, {1, 2}, {2, 0})[step]
            keep = [
                tuple(t for t in side if {t.source, t.destination} == pair)
                for side in (exchange[rank].sends[0], exchange[rank].receives[0])
            ]
            return Step(sends=(keep[0], ()), receives=(keep[1], ()))

        return tuple(part(step) for step in range(3))

    in_order = [builder(plan.problem, r) for r in range(3)]
    check_live(in_order)
    stuck = [in_order[0], (Step(), in_order[1][0], in_order[1][1]), in_order[2]]
    with pytest.raises(PlanError, match="deadlock: rank"):
        check_live(stuck)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.integers(0, 12),
       st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9))  # fmt: skip
@with_settings(max_examples=300)
def test_trimming_and_counting_keep_exactly_the_pairs(
    q0: int, nq: int, k0: int, nk: int, low: int | None, high: int | None
) -> None:
    def pairs_of(tile: Tile | None) -> set[tuple[int, int]]:
        if tile is None:
            return set()
        inside = ((q, k) for q in range(tile.q_start, tile.q_stop) for k in range(tile.k_start, tile.k_stop))
        return {
            (q, k)
            for q, k in inside
            if (tile.lower is None or k - q >= tile.lower) and (tile.upper is None or k - q <= tile.upper)
        }

    tile = Tile(q0, q0 + nq, k0, k0 + nk, low, high)
    trimmed = tile.trim()
    assert pairs_of(trimmed) == pairs_of(tile)
    if low is None or high is None or low <= high:
        assert tile.pairs() == len(pairs_of(tile))
    if trimmed is not None:
        assert trimmed.trim() == trimmed
        middle = (trimmed.q_start + trimmed.q_stop) // 2
        halves = [t for t in (replace(trimmed, q_stop=middle).trim(), replace(trimmed, q_start=middle).trim()) if t]
        assert set().union(*map(pairs_of, fuse(halves))) == pairs_of(trimmed)


@given(
    st.integers(1, 4), st.integers(0, 9), st.integers(0, 9), st.integers(0, 7), st.integers(0, 7), st.integers(-6, 6)
)
def test_a_band_on_positions_is_a_band_on_rows(stride: int, q0: int, k0: int, nq: int, nk: int, upper: int) -> None:
    tile = band_tile(Segment(q0, nq, stride), Segment(k0, nk, stride), None, upper)
    expected = sum(k0 + j * stride - q0 - i * stride <= upper for i in range(nq) for j in range(nk))
    assert (tile.pairs() if tile else 0) == expected


def test_union_joins_touching_and_nested_ranges() -> None:
    assert union([(5, 5), (8, 9), (0, 4), (1, 2), (4, 6)]) == ((0, 6), (8, 9))


def test_plan_arguments_are_refused_by_name() -> None:
    shape = tr.AttentionShape(1, 7, 7, 2, 2, 8)
    with pytest.raises(ValueError, match="7 rows over 2 ranks are not; give a Layout"):
        tr.plan("ring", world=2, shape=shape, layout="zigzag")
    with pytest.raises(ValueError, match="one of auto, ring, biring, tokenring, gather"):
        tr.plan("spiral", world=1, shape=shape, layout="zigzag")
    with pytest.raises(
        ValueError, match='direction is "sideways"; give "forward" or "backward"'.replace('"sideways"', "'sideways'")
    ):
        tr.plan("ring", world=1, shape=shape, layout="zigzag", direction="sideways")
    with pytest.raises(
        ValueError, match="backward_schedule is 'rings'; give one of auto, ring, ring:direct, biring, tokenring, gather"
    ):
        tr.plan("rings", world=1, shape=shape, layout="zigzag", direction="backward")
    with pytest.raises(ValueError, match="layout cuts 8 positions over 2 ranks; the shape has 7"):
        tr.plan("ring", world=2, shape=shape, layout=tr.Layout.zigzag(8, 2))
    with pytest.raises(ValueError, match="ranks 0 to 0"):
        tr.plan("ring", world=1, shape=shape, layout="zigzag").steps(1)
    with pytest.raises(ValueError, match="q_heads a multiple of kv_heads"):
        tr.AttentionShape(1, 7, 7, 3, 2, 8)
    with pytest.raises(ValueError, match="v_head_dim=0; all must be 1 or more"):
        tr.AttentionShape(1, 7, 7, 2, 2, 8, 0)
    with pytest.raises(ValueError, match=r"q_length=-1, .*torch.bfloat16; lengths must be 0 or more"):
        tr.AttentionShape(1, -1, 7, 2, 2, 8)
    with pytest.raises(ValueError, match="world is 0; a plan needs 1 rank or more"):
        tr.plan("ring", world=0, shape=shape, layout="zigzag")


def test_float64_lse_counts_eight_bytes() -> None:
    assert tr.AttentionShape(1, 4, 4, 2, 1, 8, 6, torch.float64).head_bytes("out") == 6 * 8 + 8
    assert tr.AttentionShape(1, 4, 4, 2, 1, 8, 6, torch.float16).head_bytes("kv") == (8 + 6) * 2

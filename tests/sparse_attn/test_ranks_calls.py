"""The call across ranks: processes, refusals before anything is sent, failures that end the wait, layouts that balance."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import tokenring as tr
from sparse_attn import anchor_attention
from sparse_attn.distributed import attend, group_layout
from sparse_attn.kernels.torch_kernel import TorchKernel
from tests.pool import Pool
from tests.sparse_attn.ranks import assert_equals_one_device, on_rank, random, run, small
from tests.sparse_attn.test_ranks_backward import upstream
from tokenring.plans.step import AHEAD_LANE


@pytest.mark.parametrize(("world", "identify"), [(3, "pooled"), (8, "rescore")])
def test_processes_equal_one_device_forward_and_backward(pool: Pool, world: int, identify: str) -> None:
    inputs = random(211, batch=2)
    layout, options = tr.Layout.zigzag(211, world), {"config": small(identify=identify)}
    do = upstream(inputs)
    results = pool.run(world, on_rank, layout, inputs, do, options)
    assert_equals_one_device(results, layout, inputs, do, options)


def refusal(group, case: str) -> str:
    """What one rank hears of a call that rank 1 gets wrong, or that ranks make differently."""
    layout, rank = tr.Layout.contiguous(96, 3), group.rank()
    q, k, v = (layout.shard(x, rank) for x in random(96))
    options = {"config": small(), "layout": layout}
    if case == "rows" and rank == 1:
        q, k, v = q[:, 1:], k[:, 1:], v[:, 1:]
    elif case == "queries" and rank == 1:
        q = q[:, 1:]
    elif case == "theta" and rank == 1:
        options["config"] = small(theta=2.0)
    elif case == "path" and rank == 1:
        options["config"] = small(theta=float("inf"))
    elif case == "kernel" and rank == 1:
        options["kernel"] = "none"
    elif case == "keys" and rank == 1:
        options["kv_layout"] = tr.Layout.contiguous(30, 3)
    elif case == "offset":
        options["layout"], options["kv_layout"] = layout.at(7), layout
    elif case == "wrong kind" and rank == 1:
        options["config"] = "rescore"
    elif case == "striped":
        options["layout"] = tr.Layout.striped(96, 3)
    elif case == "plan":
        options["plan"] = 1
    elif case == "keep" and rank == 1:
        options["keep"] = [200]
    elif case == "document" and rank == 1:
        options["cu_seqlens"] = [0, 50]
    with tr.count_traffic(group) as traffic, pytest.raises((ValueError, AttributeError)) as caught:
        attend(q, k, v, group=group, **options)
    assert not traffic.sent
    mine = (layout.shard(x, rank) for x in random(96))
    assert anchor_attention(*mine, group=group, layout=layout, config=small()).shape[1] == 32
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "here", "there"),
    [
        (
            "rows",
            "rank 1 of 3 got 31 queries; their layout has 3 ranks and gives it 32",
            "rank 1 of 3 refused this call",
        ),
        ("queries", "got 31 queries;", "rank 1 of 3 refused this call"),
        ("kernel", "none", "rank 1 of 3 refused this call"),
        ("keep", "keep has rows 200 to 200; k has rows 0 to 95", "rank 1 of 3 refused this call"),
        ("document", "must rise from 0 to the 96 rows", "rank 1 of 3 refused this call"),
        ("theta", "ranks disagree on", "ranks disagree on"),
        ("path", "ranks disagree on", "ranks disagree on"),
        ("keys", "rank 1 of 3 got 32 keys; their layout has 3 ranks and gives it 10", "rank 1 of 3 refused this call"),
        ("wrong kind", "config is 'str'; give an AnchorConfig", "rank 1 of 3 refused this call"),
        ("offset", "both must end at one position", "both must end at one position"),
        ("striped", "deals positions out one by one", "deals positions out one by one"),
        ("plan", "got plan= and group=", "got plan= and group="),
    ],
)
def test_a_wrong_call_is_refused_everywhere_before_anything_is_sent(case: str, here: str, there: str) -> None:
    heard = tr.run_local(3, refusal, case)
    assert here in heard[1] and all(there in heard[rank] for rank in (0, 2))


def lone_failure(group) -> str:
    """Rank 2 fails inside the call; the others must not wait for their time-out."""
    layout, rank = tr.Layout.contiguous(96, 3), group.rank()
    q, k, v = (layout.shard(x, rank) for x in random(96))
    tr.connect(group, timeout_seconds=60)
    if rank == 2:
        runtime = tr.connect(group)
        original, calls = runtime.push, []

        def broken(*given, **options):
            calls.append(given)
            if len(calls) == 2:
                raise MemoryError("no memory for the lines")
            original(*given, **options)

        runtime.push = broken
    start = time.monotonic()
    with pytest.raises((tr.TransportError, MemoryError)) as caught:
        attend(q, k, v, group=group, layout=layout, config=small())
    assert time.monotonic() - start < 30
    return str(caught.value)


def stalled(group) -> str:
    """Rank 2 sends its rows too late for the others."""
    layout, rank = tr.Layout.contiguous(96, 3), group.rank()
    q, k, v = (layout.shard(x, rank) for x in random(96))
    runtime = tr.connect(group, timeout_seconds=0.3)
    if rank == 2:
        original = runtime.push

        def late(lane, *given, **options):
            if lane == AHEAD_LANE:
                time.sleep(1.0)
            original(lane, *given, **options)

        runtime.push = late
    with pytest.raises(tr.TransportError) as caught:
        attend(q, k, v, group=group, layout=tr.Layout.from_runs(layout.runs[::-1]), config=small(theta=1e9))
    return str(caught.value)


def test_a_rank_that_is_late_is_named_with_rank_step_and_peer() -> None:
    heard = tr.run_local(3, stalled)
    waiting = next(text for text in heard[:2] if "timed out" in text and "failed before" not in text)
    assert "step 0: receive from rank 2 timed out after 0.3 s" in waiting and waiting.startswith("rank ")


def overlapped(group) -> float:
    """Rank 0 sends its rows only when the other ranks compute on what they hold."""
    layout, runtime = tr.Layout.zigzag(192, 3), tr.connect(group, timeout_seconds=20)
    q, k, v = (layout.shard(x, runtime.rank) for x in random(192))
    if runtime.rank == 0:
        original = runtime.push

        def held(lane, *given, **options):
            assert lane != AHEAD_LANE or all(event.wait(10) for event in COMPUTING.values())
            original(lane, *given, **options)

        runtime.push = held
    out = attend(q, k, v, group=group, layout=layout, config=small(theta=1e9, identify="pooled"))
    return float(out.double().abs().sum())


COMPUTING = {1: threading.Event(), 2: threading.Event()}


def test_ranks_compute_on_what_they_hold_while_rows_travel(monkeypatch) -> None:
    def noted(self, out, lse, q, *given):
        for rank in COMPUTING:
            if torch.equal(q, tr.Layout.zigzag(192, 3).shard(random(192)[0], rank)):
                COMPUTING[rank].set()
        original(self, out, lse, q, *given)

    original = TorchKernel.stripes_
    monkeypatch.setattr(TorchKernel, "stripes_", noted)
    assert all(total > 0 for total in tr.run_local(3, overlapped))


def test_a_rank_that_fails_inside_the_call_ends_it_for_all() -> None:
    heard = tr.run_local(3, lone_failure)
    assert "no memory" in heard[2] and all("rank 2 of 3" in heard[rank] for rank in (0, 1))


@pytest.mark.parametrize(("length", "world"), [(1024, 4), (1024, 3), (1000, 4), (517, 2), (40, 8), (0, 3), (1, 2)])
def test_group_layouts_hold_every_position_and_whole_groups_where_they_can(length: int, world: int) -> None:
    config = small()
    layout = group_layout(length, world, config)
    held = torch.cat([layout.positions(rank) for rank in range(world)]).sort().values
    assert torch.equal(held, torch.arange(length))
    starts = {run.start % 32 for rank in range(world) for run in layout.segments(rank)}
    assert starts == {0} or (length, world) != (1024, 4)


def test_group_layouts_balance_ranks_and_split_no_group() -> None:
    inputs = random(1024, seed=5)
    layout = group_layout(1024, 4, small())
    for theta in (-float("inf"), 0.5, 1.5, 1e9):
        options = {"config": small(theta=theta, identify="pooled")}
        results = run(4, layout, inputs, **options)
        assert 1.0 <= results[0][3].imbalance <= 1.15
        assert_equals_one_device(results, layout, inputs, None, options)
    contiguous = run(4, tr.Layout.contiguous(1024, 4), inputs, config=small(theta=1e9, identify="pooled"))
    assert contiguous[0][3].imbalance > 1.5


def test_bytes_stay_below_the_union_and_three_hundredths_of_a_dense_ring() -> None:
    inputs = random(4096, dims=(64, 64), seed=2)
    config = small(theta=2.5, identify="pooled", block=64, step=8)
    results = run(4, group_layout(4096, 4, config), inputs, config=config)
    stats = [result[3] for result in results]
    share = sum(s.bytes_sent for s in stats) / sum(s.ring_bytes for s in stats)
    assert 0.1 < stats[0].wanted < 0.9 and stats[0].stripe_density > 0
    assert stats[0].wanted < share < stats[0].wanted + 0.03

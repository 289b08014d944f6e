"""Ranks that do not mean the same call all raise, say why, and can go on."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import tokenring as tr
from tests.oracle import random_qkv
from tests.pool import Pool
from tokenring.agreement import agree, refuse
from tokenring.transport import HEADER_BYTES

WORLD = 3


def call(group: Any, odd: int, changes: dict, again: bool) -> str:
    """One call in which rank `odd` differs, then (the group must still work) one in which nobody does."""
    rank = group.rank()
    base = {"layout": tr.Layout.zigzag(12, WORLD), "mask": "causal", "schedule": "ring", "dtype": torch.float32}
    first = base | (changes if rank == odd else {})
    said = ""
    for options in (first, dict(base)) if again else (first,):
        dtype = options.pop("dtype", torch.float32)
        q, k, v = (base["layout"].shard(x, rank) for x in random_qkv(1, 12, 2, 1, 8, dtype))
        try:
            tr.attention(q, k, v, group=group, **options)
        except ValueError as error:
            said = f"{type(error).__name__}: {error}"
    return said


DISAGREEMENTS = {
    "mask": ({"mask": "full"}, "ranks disagree on mask: rank 1 differs from rank 0"),
    "schedule": ({"schedule": "gather"}, "ranks disagree on schedule"),
    "dtype": ({"dtype": torch.float64}, "ranks disagree on shape or dtype"),
    "backward": ({"backward_schedule": "tokenring"}, "ranks disagree on scale, softcap, sinks or backward"),
    "scale": ({"scale": 0.5}, "ranks disagree on scale, softcap, sinks or backward"),
    "layout": ({"layout": tr.Layout.zigzag(12, WORLD, offset=3)}, "ranks disagree on layout"),
}


@pytest.mark.parametrize("part", DISAGREEMENTS)
def test_ranks_that_disagree_all_raise_and_can_go_on(pool: Pool, part: str) -> None:
    changes, message = DISAGREEMENTS[part]
    for results in (tr.run_local(WORLD, call, 1, changes, True), pool.run(WORLD, call, 1, changes, True)):
        for said in results:
            assert message in said


def test_uneven_shards_behind_a_layout_name_are_found(pool: Pool) -> None:
    results = pool.run(2, uneven)
    assert all("ranks disagree on shape or dtype" in said for said in results)


def uneven(group: Any) -> str:
    rows = 4 - group.rank()
    q = torch.randn(1, rows, 2, 8)
    with pytest.raises(tr.AgreementError) as caught:
        tr.attention(q, q, q, group=group)
    return str(caught.value)


def test_a_rank_that_refuses_its_own_arguments_tells_the_others(pool: Pool) -> None:
    for results in (
        tr.run_local(WORLD, call, 2, {"mask": "diagonal"}, True),
        pool.run(WORLD, call, 2, {"mask": "diagonal"}, True),
    ):
        assert results[2].startswith("ValueError: mask is 'diagonal'; give")
        for said in results[:2]:
            assert said.startswith("AgreementError: rank 2 of 3 refused this call: mask is 'diagonal'; give")


def test_a_rank_that_missed_a_call_is_found() -> None:
    def work(group: Any) -> str:
        runtime = tr.connect(group)
        runtime.calls += group.rank() == 1
        return call(group, 0, {}, False)

    said = "ranks disagree on number of calls made: rank 1 says 2, rank 0 1"
    assert all(said in told for told in tr.run_local(WORLD, work))


def test_headers_are_counted_apart_and_a_prepared_plan_sends_none() -> None:
    layout = tr.Layout.zigzag(12, WORLD)
    shape = tr.AttentionShape(1, 12, 12, 2, 1, 8, dtype=torch.float32)
    plan = tr.plan("tokenring", world=WORLD, shape=shape, layout=layout)

    def work(group: Any) -> list:
        local = [layout.shard(x, group.rank()) for x in random_qkv(1, 12, 2, 1, 8, torch.float32)]
        counted = []
        for prepared in (False, True):
            if prepared:
                tr.prepare(group, plan)
            with tr.count_traffic(group) as traffic:
                tr.attention(*local, group=group, plan=plan)
            counted.append((sum(traffic.sent.values()), sum(traffic.control.values())))
        return counted

    for rank, (plain, prepared) in enumerate(tr.run_local(WORLD, work)):
        assert plain[0] == prepared[0] == plan.bytes_sent(rank)
        assert plain[1] == (WORLD - 1) * HEADER_BYTES and prepared[1] == 0


def local_shards(rank: int) -> list[torch.Tensor]:
    return [tr.Layout.zigzag(12, WORLD).shard(x, rank) for x in random_qkv(1, 12, 2, 1, 8, torch.float32)]


def plan_of(direction: str = "forward", schedule: str = "ring") -> tr.Plan:
    shape = tr.AttentionShape(1, 12, 12, 2, 1, 8, dtype=torch.float32)
    return tr.plan(schedule, world=WORLD, shape=shape, layout="zigzag", direction=direction)


def refuse_prepared(group: Any) -> tuple[str, str, float]:
    """Rank 1 refuses a call that the others have begun; then all try once more."""
    runtime, plan = tr.connect(group, timeout_seconds=60.0), plan_of()
    said, start = [], time.monotonic()
    for turn in range(2):
        try:
            if turn == 0:
                tr.prepare(runtime, plan)
            if turn == 0 and runtime.rank == 1:
                refuse(runtime, ValueError("scale is nan"), prepared=True)
            tr.attention(*local_shards(runtime.rank), group=runtime, plan=plan)
        except tr.TransportError as error:
            said.append(str(error))
    return *said, time.monotonic() - start


def on_lanes_of_its_own(group: Any, function: Any, *args: Any) -> Any:
    from tokenring.transport.distributed import DistributedTransport

    return function(DistributedTransport(group, 60.0), *args)


def test_a_refusal_of_a_prepared_call_gives_up_the_group_at_once(pool: Pool) -> None:
    for results in (tr.run_local(WORLD, refuse_prepared), pool.run(WORLD, on_lanes_of_its_own, refuse_prepared)):
        for rank, (first, second, seconds) in enumerate(results):
            assert seconds < 20.0
            if rank != 1:
                assert first.startswith(f"rank {rank} of 3, ") and "rank 1 of 3: ValueError: scale is nan" in first
            assert "cannot be used again" in second and "ValueError: scale is nan" in second


def walk(group: Any, calls: dict[int, list[tuple]]) -> list[str]:
    """What agreeing on each (direction, forward call) of this rank's list says; then on one that all ranks share."""
    runtime, said = tr.connect(group), []
    for direction, forward_call in [*calls.get(runtime.rank, calls[0]), ("forward", 0)]:
        try:
            agree(runtime, plan_of(direction), (), forward_call=forward_call)
            runtime.settle()
            said.append("")
        except tr.AgreementError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("where", ["threads", "processes"])
def test_backward_passes_that_differ_are_found(pool: Pool, where: str) -> None:
    def on_all_ranks(*args: Any) -> list:
        if where == "threads":
            return tr.run_local(WORLD, *args)
        return pool.run(WORLD, on_lanes_of_its_own, *args)

    skipped = {0: [("backward", 1)], 1: [("forward", 0)]}
    for said, after in on_all_ranks(walk, skipped):
        assert "disagree on direction: rank 1 is in a forward pass, rank 0 in a backward pass" in said and after == ""
    swapped = {0: [("backward", 2), ("backward", 1)], 2: [("backward", 1), ("backward", 2)]}
    for first, second, after in on_all_ranks(walk, swapped):
        assert "which forward call this is the backward of: rank 2 says 1, rank 0 2" in first
        assert "rank 2 says 2, rank 0 1" in second and after == ""


def late(group: Any, mask: str) -> tuple:
    """Rank 1 comes 0.5 s after the others, with the mask given; the next call is alike on all ranks."""
    runtime, layout = tr.connect(group), tr.Layout.zigzag(12, WORLD)
    runtime.all_gather(torch.zeros(1))
    if runtime.rank == 1:
        time.sleep(0.5)
    start, said = time.perf_counter(), ""
    with tr.trace(group) as trace, tr.count_traffic(group) as traffic:
        try:
            own = mask if runtime.rank == 1 else "causal"
            tr.attention(*local_shards(runtime.rank), group=group, layout=layout, mask=own, schedule="tokenring")
        except tr.AgreementError as error:
            said = str(error)
    computed = [event.start - start for event in trace.events if event.kind == "compute"]
    out = tr.attention(*local_shards(runtime.rank), group=group, layout=layout, schedule="tokenring")
    return said, computed, sum(traffic.sent.values()), out


@pytest.mark.parametrize("mask", ["causal", "full"])
def test_a_late_rank_holds_up_payload_but_not_what_the_others_compute_alone(pool: Pool, mask: str) -> None:
    alone = tr.attention(*random_qkv(1, 12, 2, 1, 8, torch.float32))
    for rank, (said, computed, sent, out) in enumerate(pool.run(WORLD, on_lanes_of_its_own, late, mask)):
        if rank != 1:
            assert computed[0] < 0.3, "it computed only when the late rank had come"
        if mask == "full":
            assert "ranks disagree on mask" in said and sent == 0
        else:
            assert said == "" and sent == plan_of(schedule="tokenring").bytes_sent(rank)
        torch.testing.assert_close(out, tr.Layout.zigzag(12, WORLD).shard(alone, rank), rtol=0, atol=1e-5)


def all_to_itself(group: Any) -> str:
    """Each rank sees its own rows only: nothing is ever waited for, and a disagreement is found all the same."""
    runtime, layout = tr.connect(group), tr.Layout.contiguous(12, WORLD)
    mask = tr.Mask.documents([0, 4, 8, 12], causal=runtime.rank != 2)
    q, k, v = (layout.shard(x, runtime.rank) for x in random_qkv(1, 12, 2, 1, 8, torch.float32))
    with pytest.raises(tr.AgreementError) as caught:
        tr.attention(q, k, v, group=group, layout=layout, mask=mask, schedule="ring")
    return str(caught.value)


def test_a_call_that_waits_for_nobody_is_agreed_on_too(pool: Pool) -> None:
    for results in (tr.run_local(WORLD, all_to_itself), pool.run(WORLD, on_lanes_of_its_own, all_to_itself)):
        assert all("ranks disagree on mask: rank 2 differs from rank 0" in said for said in results)


def two_calls(group: Any, swapped: bool) -> list[str]:
    """Two forward calls, then their gradients, which rank 1 may ask for the other way round; then one more call."""
    runtime, said = tr.connect(group), []
    leaves = [[x.requires_grad_() for x in local_shards(runtime.rank)] for _ in range(2)]
    outs = [tr.attention(*each, group=runtime) for each in leaves]
    for which in (0, 1) if swapped and runtime.rank == 1 else (1, 0):
        try:
            outs[which].sum().backward()
            said.append("")
        except tr.AgreementError as error:
            said.append(str(error))
    tr.attention(*local_shards(runtime.rank), group=runtime)
    return said


@pytest.mark.parametrize("where", ["threads", "processes"])
def test_backward_passes_of_other_forward_calls_are_found(pool: Pool, where: str) -> None:
    def on_all_ranks(swapped: bool) -> list[list[str]]:
        if where == "threads":
            return tr.run_local(WORLD, two_calls, swapped)
        return pool.run(WORLD, on_lanes_of_its_own, two_calls, swapped)

    assert on_all_ranks(False) == [["", ""]] * WORLD
    for first, second in on_all_ranks(True):
        assert "which forward call this is the backward of: rank 1 says 1, rank 0 2" in first
        assert "rank 1 says 2, rank 0 1" in second


def refused_when_prepared(group: Any) -> tuple[list[str], float]:
    """The second of three prepared calls has a bad scale on rank 1."""
    runtime, plan = tr.connect(group, timeout_seconds=60.0), plan_of()
    tr.prepare(runtime, plan)
    said, start = [], time.monotonic()
    for scale in (None, float("nan"), None):
        try:
            q, k, v = local_shards(runtime.rank)
            tr.attention(q, k, v, group=runtime, plan=plan, scale=scale if runtime.rank == 1 else None)
            said.append("")
        except (ValueError, tr.TransportError) as error:
            said.append(str(error))
    return said, time.monotonic() - start


def test_an_argument_refused_under_a_prepared_plan_raises_everywhere_at_once(pool: Pool) -> None:
    for results in (
        tr.run_local(WORLD, refused_when_prepared),
        pool.run(WORLD, on_lanes_of_its_own, refused_when_prepared),
    ):
        for rank, ((first, second, third), seconds) in enumerate(results):
            # A rank that is still in the first call when rank 1 gives up the group hears of it there.
            assert "scale is nan" in (first or second) and (rank != 1 or first == "")
            assert "cannot be used again" in third and seconds < 20.0


def test_a_group_forgets_the_oldest_prepared_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenring.agreement.PREPARED_PLANS", 1)
    plans = [plan_of(), plan_of(schedule="gather")]

    def work(group: Any) -> list[int]:
        for plan in plans:
            tr.prepare(group, plan)
        sent = []
        for plan in plans:
            with tr.count_traffic(group) as traffic:
                tr.attention(*local_shards(group.rank()), group=group, plan=plan)
            sent.append(sum(traffic.control.values()))
        return sent

    assert tr.run_local(WORLD, work) == [[(WORLD - 1) * HEADER_BYTES, 0]] * WORLD

"""Transports: order, uneven sizes, counters, time-outs that name rank, step and peer."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tokenring as tr
from tests.pool import Pool
from tokenring.transport import TransportError, connect
from tokenring.transport.distributed import DistributedTransport
from tokenring.transport.inprocess import LocalWorld


def uneven(group: Any) -> tuple:
    runtime = connect(group)
    rank, world = runtime.rank, runtime.world
    rows = torch.full((rank % 3, 2), rank, dtype=torch.int64)
    gathered = runtime.all_gather(rows)
    parts = [torch.full(((p + rank) % 2 * 3,), 10.0 * rank + p) for p in range(world)]
    swapped = runtime.all_to_all(parts)
    flags = runtime.all_gather(torch.tensor([rank > 1]), same_shape=True)
    told = runtime.broadcast(torch.tensor([rank]), world - 1)
    assert [int(x) for x in runtime.all_gather(torch.tensor(rank))] == list(range(world))
    return gathered, swapped, flags, told


def check_uneven(results: list, world: int) -> None:
    for rank, (gathered, swapped, flags, told) in enumerate(results):
        assert [g.tolist() for g in gathered] == [[[r, r]] * (r % 3) for r in range(world)]
        assert [s.flatten().tolist() for s in swapped] == [
            [10.0 * p + rank] * int(s.numel()) for p, s in enumerate(swapped)
        ]
        assert [bool(f) for f in flags] == [r > 1 for r in range(world)]
        assert told.item() == world - 1


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_uneven_collectives_in_threads(world: int) -> None:
    check_uneven(tr.run_local(world, uneven), world)


@pytest.mark.parametrize("world", [2, 5])
def test_uneven_collectives_in_processes(pool: Pool, world: int) -> None:
    check_uneven(pool.run(world, uneven), world)


def both_ways(group: Any) -> tuple:
    """Two lanes and two steps in flight at once, to the one other rank, as a both-way ring of two ranks has them."""
    runtime = connect(group)
    peer = 1 - runtime.rank
    buffers = {(lane, step): torch.empty(4) for lane in (0, 1) for step in (0, 1)}
    for (lane, step), buffer in buffers.items():
        runtime.open(lane, step, [(peer, buffer)])
    for lane, step in buffers:
        runtime.push(lane, step, [(peer, torch.full((4,), 100.0 * runtime.rank + 10 * lane + step))])
    for lane, step in reversed(buffers):
        runtime.wait(lane, step)
    return {key: buffer[0].item() for key, buffer in buffers.items()}


def test_two_ranks_never_mix_lanes_or_steps(pool: Pool) -> None:
    for results in (tr.run_local(2, both_ways), pool.run(2, both_ways)):
        for rank, seen in enumerate(results):
            assert seen == {(lane, step): 100.0 * (1 - rank) + 10 * lane + step for lane in (0, 1) for step in (0, 1)}


def unlike_histories(group: Any) -> int:
    """Ranks that made different numbers of groups before must still agree on the lanes of a new one."""
    if dist.get_rank() == 1:
        dist.new_group([1], use_local_synchronization=True)
    fresh = dist.new_group(list(range(dist.get_world_size())))
    return int(connect(fresh).all_gather(torch.tensor([dist.get_rank()]))[1])


def test_lanes_do_not_depend_on_how_many_groups_a_rank_made_before(pool: Pool) -> None:
    assert pool.run(8, unlike_histories) == [1] * 8


def count(group: Any) -> dict:
    runtime = connect(group)
    with tr.count_traffic(group) as traffic, tr.trace(group) as trace:
        runtime.all_gather(torch.zeros(runtime.rank, 2))
    runtime.all_gather(torch.zeros(5))
    return traffic.sent, traffic.control, [e.kind for e in trace.events]


def test_traffic_counts_payload_apart_from_sizes_and_only_inside_the_block() -> None:
    for rank, (sent, control, kinds) in enumerate(tr.run_local(3, count)):
        peers = [p for p in range(3) if p != rank]
        assert sent == {(rank, p): rank * 2 * 4 for p in peers}
        assert control == {(rank, p): 8 for p in peers}
        assert kinds.count("send") == 2 and "wait" in kinds


def one_rank_stays_away(group: Any) -> str:
    runtime = connect(group, timeout_seconds=0.2)
    if runtime.rank == 1:
        return ""
    with pytest.raises(TransportError) as caught:
        runtime.exchange([], [(1, torch.empty(3))])
    with pytest.raises(TransportError, match="cannot be used again"):
        runtime.exchange([], [])
    return str(caught.value)


def test_a_wait_times_out_naming_rank_step_and_peer_and_poisons_the_group() -> None:
    message = tr.run_local(2, one_rank_stays_away)[0]
    assert "rank 0 of 2, step -1" in message and "rank 1" in message and "0.2 s" in message


def stay_away_in_a_group_of_our_own(group: Any) -> str:
    own = dist.new_group([0, 1])
    return one_rank_stays_away(own) if dist.get_rank() < 2 else ""


def test_a_wait_times_out_in_processes_too() -> None:
    workers = Pool()
    try:
        message = workers.run(8, stay_away_in_a_group_of_our_own)[0]
    finally:
        workers.stop()
    assert "rank 0 of 2, step -1: receive from rank 1" in message and "0.2 s" in message


def test_a_failing_rank_wakes_the_others_and_is_the_one_that_is_raised() -> None:
    def fail(group: Any) -> None:
        if group.rank() == 2:
            raise KeyError("broken")
        connect(group).all_gather(torch.zeros(1))

    with pytest.raises(KeyError, match="broken"):
        tr.run_local(3, fail)


def test_the_error_of_run_local_is_the_first_ranks_and_not_what_came_of_it() -> None:
    def fail(group: Any) -> None:
        runtime = connect(group)
        with runtime.shared_fate():
            if runtime.rank == 1:
                raise MemoryError("too long a sequence")
        with pytest.raises(TransportError, match="rank 1 of 3: MemoryError: too long a sequence"):
            runtime.all_gather(torch.zeros(1))
        raise TransportError("what came of it")

    with pytest.raises(MemoryError, match="too long"):
        tr.run_local(3, fail)


def waits_for_a_busy_rank(group: Any) -> tuple[str, float]:
    """Rank 0 waits for rank 1, which is busy and well; rank 2 fails outside of any call."""
    runtime, start = DistributedTransport(group, 60.0), time.monotonic()
    try:
        with runtime.shared_fate():
            if runtime.rank == 2:
                raise MemoryError("too long a sequence")
            if runtime.rank == 1:
                time.sleep(4.0)
            runtime.exchange([], [(1 - runtime.rank, torch.empty(3))])
    except (MemoryError, TransportError) as error:
        return str(error), time.monotonic() - start
    return "", 0.0


def test_a_rank_that_waits_for_another_hears_of_a_third(pool: Pool) -> None:
    (waiting, seconds), (busy, _), (failed, _) = pool.run(3, waits_for_a_busy_rank)
    assert failed == "too long a sequence"
    told = "rank 2 of 3: MemoryError: too long a sequence"
    assert waiting == f"rank 0 of 3, step -1: receive from rank 1 failed: {told}"
    assert seconds < 3.5, "it heard only when the busy rank came back"
    assert busy.startswith("rank 1 of 3, step -1: receive from rank 0 failed: ") and told in busy


def one_rank_does_not_come(group: Any) -> str:
    if dist.get_rank() == 1:
        return ""
    with pytest.raises(TransportError) as caught:
        DistributedTransport(group, 1.0)
    return str(caught.value)


def test_lanes_that_cannot_be_made_name_the_ranks_that_did_not_come() -> None:
    workers = Pool(2)
    try:
        message = workers.run(2, one_rank_does_not_come)[0]
    finally:
        workers.stop()
    assert message.startswith("rank 0 of 2, set-up: ranks [1] did not come (time-out 1 s)")


def test_in_process_mismatches_are_named() -> None:
    shared = LocalWorld(2)
    sender, receiver = (connect(g) for g in shared.groups())
    receiver.open(0, 3, [(0, torch.empty(4))])
    thread = threading.Thread(target=sender.push, args=(0, 3, [(1, torch.zeros(5))]))
    thread.start()
    thread.join()
    with pytest.raises(TransportError, match=r"rank 1 of 2, step 3: rank 0 sent \(5,\)"):
        receiver.wait(0, 3)


def test_groups_that_are_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="a ProcessGroup this rank belongs to"):
        connect(object())
    with pytest.raises(ValueError, match="at least 1 rank"):
        LocalWorld(0)
    with pytest.raises(ValueError, match="give one part for each rank"):
        connect(None).all_to_all([])


def test_one_rank_alone_can_be_traced_through_its_transport() -> None:
    alone = connect(None)
    q = torch.randn(1, 5, 2, 8)
    with tr.trace(alone) as trace:
        tr.attention(q, q, q, group=alone)
    assert [event.kind for event in trace.events] == ["compute", "merge"]
    with pytest.raises(ValueError, match="trace got no group"), tr.trace(None):
        pass

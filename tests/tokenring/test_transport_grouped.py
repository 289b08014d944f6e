"""The transport as it is over NCCL, whose rules a lane of gloo is held to: one group an exchange, no tags, waits that never block."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tokenring as tr
from tests.oracle import dense_attention, random_qkv
from tests.pool import Pool
from tokenring.transport import LANES, TransportError
from tokenring.transport.distributed import DistributedTransport


class GroupedLane:
    """gloo behind NCCL's rules: nothing moves before a group is closed; a wait never blocks; abort ends all that runs."""

    def __init__(self, lane: Any, log: list[str]) -> None:
        self.lane, self.log, self.group = lane, log, None

    def _start_coalescing(self) -> None:
        assert self.group is None
        self.group = []

    def recv(self, tensors: list, peer: int, tag: int) -> None:
        self._add("recv", tensors, peer, tag)

    def send(self, tensors: list, peer: int, tag: int) -> None:
        self._add("send", tensors, peer, tag)

    def _add(self, verb: str, tensors: list, peer: int, tag: int) -> None:
        assert tag == 0 and self.group is not None, "no tags, and all of an exchange in one group"
        self.group.append((verb, tensors, peer))

    def _end_coalescing(self) -> GroupedWork:
        group, self.group = self.group, None
        self.log.append("+".join(verb for verb, _, _ in group))
        return GroupedWork([getattr(self.lane, verb)(tensors, peer, 0) for verb, tensors, peer in group])

    def abort(self) -> None:
        self.log.append("abort")
        self.lane = None


class GroupedWork:
    """What `_end_coalescing` gives. gloo has no streams, so the first wait is for real, unless nobody answers."""

    def __init__(self, works: list) -> None:
        self.works, self.done = works, False

    def wait(self) -> None:
        for work in self.works:
            try:
                work.wait(timedelta(seconds=0.3))
            except RuntimeError:
                return
        self.done = True

    def is_completed(self) -> bool:
        return self.done


class Grouped(DistributedTransport):
    """The transport as it is over NCCL, on CPUs."""

    def _set_up(self, store: Any) -> None:
        self._grouped, self.log = True, []
        super()._set_up(store)

    def _make_lane(self, store: Any) -> Any:
        return GroupedLane(self._make_gloo(store), self.log)


def attend_grouped(group: Any) -> tuple:
    runtime = Grouped(group, 60.0)
    warmed, layout = list(runtime.log), tr.Layout.zigzag(12, runtime.world)
    local = [layout.shard(x, runtime.rank) for x in random_qkv(1, 12, 2, 1, 8, torch.float64)]
    return tr.attention(*local, group=runtime, schedule="tokenring"), warmed, runtime.log


def test_the_grouped_transport_hands_over_each_exchange_as_one_group(pool: Pool) -> None:
    qkv = random_qkv(1, 12, 2, 1, 8, torch.float64)
    positions = torch.arange(12)
    expected, _ = dense_attention(*qkv, tr.Mask.causal().dense(positions, positions))
    layout = tr.Layout.zigzag(12, 3)
    for rank, (out, warmed, log) in enumerate(pool.run(3, attend_grouped)):
        torch.testing.assert_close(out, layout.shard(expected, rank), rtol=0, atol=1e-12)
        assert warmed == ["recv+recv+send+send"] * LANES, "each lane is warmed towards every peer"
        assert "recv+send" in log and not [group for group in log if "send+recv" in group]


def a_grouped_exchange_never_ends(group: Any) -> list[str]:
    """Rank 1 fails after rank 0 has begun; or (time-out) never comes."""
    said = []
    for seconds in (60.0, 2.0):
        runtime = Grouped(group, 60.0)
        runtime.timeout_seconds = seconds
        if runtime.rank == 1:
            if seconds == 60.0:
                runtime.abandon(KeyError("broken"))
            dist.barrier(group)
            continue
        start = time.monotonic()
        runtime.open(0, 7, [(1, torch.empty(2))])
        runtime.push(0, 7, [])
        runtime.wait(0, 7)
        while runtime.log.count("abort") < LANES and time.monotonic() - start < 20.0:
            time.sleep(0.05)
        with pytest.raises(TransportError) as caught:
            runtime.wait(0, 7)
        said.append(str(caught.value))
        dist.barrier(group)
    return said


def test_a_grouped_exchange_that_never_ends_is_aborted_and_named() -> None:
    workers = Pool(2)
    try:
        failed, late = workers.run(2, a_grouped_exchange_never_ends)[0]
    finally:
        workers.stop()
    assert failed == "rank 0 of 2, step 7: exchange with rank 1 failed: rank 1 of 2: KeyError: 'broken'"
    assert late == "rank 0 of 2, step 7: exchange with rank 1 timed out after 2 s"

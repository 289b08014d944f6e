"""Ranks that do not mean the same call all raise, say why, and can go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenring as tr
from tests.oracle import random_qkv
from tests.pool import Pool

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
def test_ranks_that_disagree_all_raise_and_can_go_on(part: str) -> None:
    changes, message = DISAGREEMENTS[part]
    for said in tr.run_local(WORLD, call, 1, changes, True):
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

    assert all("ranks disagree on number of calls made" in said for said in tr.run_local(WORLD, work))


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
        assert plain[1] == (WORLD - 1) * 512 and prepared[1] == 0


def test_a_refusal_of_a_prepared_call_sends_nothing_into_the_others_payload() -> None:
    layout = tr.Layout.zigzag(12, WORLD)
    plan = tr.plan("ring", world=WORLD, shape=tr.AttentionShape(1, 12, 12, 2, 1, 8, dtype=torch.float32), layout=layout)

    def work(group: Any) -> tuple:
        local = [layout.shard(x, group.rank()) for x in random_qkv(1, 12, 2, 1, 8, torch.float32)]
        tr.prepare(group, plan)
        with tr.count_traffic(group) as traffic:
            if group.rank() == 1:
                with pytest.raises(ValueError, match="scale is nan"):
                    tr.attention(*local, group=group, plan=plan, scale=float("nan"))
            out = tr.attention(*local, group=group, plan=plan)
        return out, traffic.control

    alone = tr.attention(*random_qkv(1, 12, 2, 1, 8, torch.float32))
    for rank, (out, control) in enumerate(tr.run_local(WORLD, work)):
        assert control == {}
        torch.testing.assert_close(out, layout.shard(alone, rank), rtol=0, atol=1e-5)

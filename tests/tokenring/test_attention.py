"""Attention over ranks against dense attention in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as with_settings
from hypothesis import strategies as st

import tokenring as tr
from tests.oracle import dense_attention, random_qkv
from tests.pool import Pool
from tokenring import executor

SCHEDULES = ("ring", "biring", "tokenring", "gather")
LAYOUTS = ("contiguous", "zigzag", "striped")


def attend(group: Any, qkv: tuple, layout: tr.Layout, kv_layout: tr.Layout | None, options: dict) -> tuple:
    """This rank's (out, lse), and the payload bytes that left it for each peer."""
    rank = group.rank()
    q, k, v = qkv
    keys = layout if kv_layout is None else kv_layout
    local = (layout.shard(q, rank), keys.shard(k, rank), keys.shard(v, rank))
    with tr.count_traffic(group) as traffic:
        out, lse = tr.attention(*local, group=group, layout=layout, kv_layout=kv_layout, return_lse=True, **options)
    return out, lse, {destination: size for (_, destination), size in traffic.sent.items()}


def assert_equal_to_dense(results: list, expected: tuple, layout: tr.Layout, tolerance: float) -> None:
    for rank, (out, lse, _) in enumerate(results):
        want_out, want_lse = layout.shard(expected[0], rank), layout.shard(expected[1], rank, dim=2)
        torch.testing.assert_close(out.double(), want_out, rtol=0, atol=tolerance)
        torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=tolerance)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_equals_dense_attention(world: int, schedule: str) -> None:
    for length in (1, 2, 7, 16, 29):
        qkv = random_qkv(2, length, 4, 2, 8, torch.float64, seed=length)
        positions = torch.arange(length)
        for mask in (tr.Mask.causal(), tr.Mask.full(), tr.Mask.window(5)):
            expected = dense_attention(*qkv, mask.dense(positions, positions))
            for name in LAYOUTS:
                layout = getattr(tr.Layout, name)(length, world)
                results = tr.run_local(world, attend, qkv, layout, None, {"mask": mask, "schedule": schedule})
                assert_equal_to_dense(results, expected, layout, 1e-12)


@pytest.mark.parametrize("world", [2, 3, 4, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (8, 1), (9, 3)])
def test_ranks_in_processes_equal_dense_attention_and_count_the_planned_bytes(
    pool: Pool, world: int, schedule: str, heads: tuple[int, int]
) -> None:
    for length, name, mask in ((37, "zigzag", "causal"), (world - 1, "zigzag", "causal"), (24, "contiguous", "full")):
        qkv = random_qkv(1, length, *heads, 16, torch.float64, seed=world)
        layout = getattr(tr.Layout, name)(length, world)
        results = pool.run(world, attend, qkv, layout, None, {"mask": mask, "schedule": schedule})
        positions = torch.arange(length)
        expected = dense_attention(*qkv, tr.Mask.of(mask).dense(positions, positions))
        assert_equal_to_dense(results, expected, layout, 1e-12)
        shape = tr.AttentionShape(1, length, length, *heads, 16, dtype=torch.float64)
        plan = tr.plan(schedule, world=world, shape=shape, layout=layout, mask=mask)
        for rank, (_, _, sent) in enumerate(results):
            assert sent == {d: plan.bytes_sent(rank, d) for d in range(world) if plan.bytes_sent(rank, d)}


@given(data=st.data())
@with_settings(max_examples=60)
def test_any_shape_layout_and_offset_equals_dense_attention(data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 6), "world")
    kv_length = data.draw(st.integers(1, 40), "keys")
    length = data.draw(st.integers(1, kv_length), "queries")
    kv_heads, group_size = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([1, 2, 4]))
    q_name, k_name = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.sampled_from(LAYOUTS))
    mask = data.draw(st.sampled_from([tr.Mask.causal(), tr.Mask.full(), tr.Mask.window(3), tr.Mask.window(2, 1)]))
    schedule = data.draw(st.sampled_from((*SCHEDULES, "auto")))
    qkv = random_qkv(
        1, length, kv_heads * group_size, kv_heads, 4, torch.float64, kv_length=kv_length, seed=length, v_dim=6
    )
    layout = getattr(tr.Layout, q_name)(length, world)
    kv_layout = getattr(tr.Layout, k_name)(kv_length, world)
    results = tr.run_local(world, attend, qkv, layout, kv_layout, {"mask": mask, "schedule": schedule})
    allowed = mask.dense(torch.arange(kv_length - length, kv_length), torch.arange(kv_length))
    assert_equal_to_dense(results, dense_attention(*qkv, allowed), layout, 1e-12)
    shape = tr.AttentionShape(1, length, kv_length, kv_heads * group_size, kv_heads, 4, 6, torch.float64)
    report = tr.plan(schedule, world=world, shape=shape, layout=layout, kv_layout=kv_layout, mask=mask).check()
    assert report.pairs == int(allowed.sum())
    assert report.bytes == sum(size for _, _, sent in results for size in sent.values())


def test_an_explicit_offset_wins_over_bottom_right_alignment() -> None:
    qkv = random_qkv(1, 4, 2, 2, 8, torch.float64, kv_length=10)
    layout, kv_layout = tr.Layout.contiguous(4, 2, offset=3), tr.Layout.zigzag(10, 2)
    results = tr.run_local(2, attend, qkv, layout, kv_layout, {"mask": "causal", "schedule": "tokenring"})
    expected = dense_attention(*qkv, tr.Mask.causal().dense(torch.arange(3, 7), torch.arange(10)))
    assert_equal_to_dense(results, expected, layout, 1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_queries_before_every_key_give_zeros_and_minus_infinity(schedule: str) -> None:
    qkv = random_qkv(1, 6, 2, 1, 8, torch.float32)
    layout, kv_layout = tr.Layout.contiguous(6, 3, offset=2), tr.Layout.contiguous(6, 3, offset=5)
    results = tr.run_local(3, attend, qkv, layout, kv_layout, {"mask": "causal", "schedule": schedule})
    expected = dense_attention(*qkv, tr.Mask.causal().dense(torch.arange(2, 8), torch.arange(5, 11)))
    assert torch.isneginf(expected[1]).any()
    assert_equal_to_dense(results, expected, layout, 1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_softcap_sinks_and_scale_are_honoured(schedule: str) -> None:
    qkv = random_qkv(2, 13, 4, 2, 8, torch.float64)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    layout = tr.Layout.zigzag(13, 3)
    options = {"schedule": schedule, "softcap": 1.5, "sinks": sinks, "scale": 0.7}
    results = tr.run_local(3, attend, qkv, layout, None, options)
    allowed = tr.Mask.causal().dense(torch.arange(13), torch.arange(13))
    expected = dense_attention(*qkv, allowed, scale=0.7, softcap=1.5, sinks=sinks)
    assert_equal_to_dense(results, expected, layout, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_error_stays_within_twice_the_single_rank_kernel(dtype: torch.dtype, schedule: str) -> None:
    qkv = random_qkv(1, 96, 4, 2, 32, dtype)
    positions = torch.arange(96)
    exact, _ = dense_attention(*qkv, tr.Mask.causal().dense(positions, positions))
    alone = (tr.attention(*qkv).double() - exact).abs().max().item()
    for world in (2, 5, 8):
        layout = tr.Layout.zigzag(96, world)
        results = tr.run_local(world, attend, qkv, layout, None, {"schedule": schedule})
        error = max((out.double() - layout.shard(exact, r)).abs().max().item() for r, (out, _, _) in enumerate(results))
        assert results[0][0].dtype == dtype
        assert error <= 2 * alone + 1e-7, (world, error, alone)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_runs_are_bitwise_repeatable(schedule: str) -> None:
    qkv = random_qkv(1, 64, 4, 2, 16, torch.float32)
    layout = tr.Layout.zigzag(64, 4)
    first, second = (tr.run_local(4, attend, qkv, layout, None, {"schedule": schedule}) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second))


def test_non_contiguous_inputs_and_a_shared_plan_give_the_same_result() -> None:
    q, k, v = random_qkv(2, 12, 4, 2, 8, torch.float32)
    layout = tr.Layout.zigzag(12, 3)
    shape = tr.AttentionShape(2, 12, 12, 4, 2, 8, dtype=torch.float32)
    plan = tr.plan("tokenring", world=3, shape=shape, layout=layout)

    def both(group: Any) -> tuple:
        local = [layout.shard(x, group.rank()) for x in (q, k, v)]
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in local]
        return tr.attention(*local, group=group, plan=plan), tr.attention(
            *turned, group=group, layout=layout, schedule="tokenring"
        )

    for straight, strided in tr.run_local(3, both):
        assert torch.equal(straight, strided)


def test_a_name_needs_no_length_where_shards_are_equal() -> None:
    qkv = random_qkv(1, 20, 2, 2, 8, torch.float64)
    layout = tr.Layout.zigzag(20, 4)

    def named(group: Any) -> torch.Tensor:
        return tr.attention(*(layout.shard(x, group.rank()) for x in qkv), group=group, layout="zigzag")

    expected, _ = dense_attention(*qkv, tr.Mask.causal().dense(torch.arange(20), torch.arange(20)))
    for rank, out in enumerate(tr.run_local(4, named)):
        torch.testing.assert_close(out, layout.shard(expected, rank), rtol=0, atol=1e-12)


BAD_CALLS = {
    "three dims": (lambda q, k, v: tr.attention(q[0], k, v), r"each must be \(batch, rows, heads, head dim\)"),
    "heads": (
        lambda q, k, v: tr.attention(q[:, :, :3], k, v),
        r"3 query heads and 2 key heads; query heads must be a multiple",
    ),
    "dtype": (lambda q, k, v: tr.attention(q.double(), k, v), r"give one floating dtype on one device"),
    "rows": (lambda q, k, v: tr.attention(q, k[:, :3], v[:, :3]), r"got 3 rows; its kv_layout .*give kv_layout"),
    "layout name": (lambda q, k, v: tr.attention(q, k, v, layout="diagonal"), r"one of contiguous, zigzag, striped"),
    "layout length": (
        lambda q, k, v: tr.attention(q, k, v, layout=tr.Layout.zigzag(9, 1)),
        r"got 4 rows; its layout has 1 ranks and gives it 9",
    ),
    "mask": (
        lambda q, k, v: tr.attention(q, k, v, mask=torch.ones(4, 4)),
        r'give "causal", "full" or a tokenring.Mask',
    ),
    "schedule": (
        lambda q, k, v: tr.attention(q, k, v, schedule="star"),
        r"one of auto, ring, biring, tokenring, gather",
    ),
    "scale": (lambda q, k, v: tr.attention(q, k, v, scale=-0.5), "scale is -0.5; it must be above 0"),
    "plan": (lambda q, k, v: tr.attention(q, k, v, plan="ring"), "plan is 'ring'; give what tokenring.plan returned"),
    "dropout": (lambda q, k, v: tr.attention(q, k, v, dropout=0.1), "dropout is 0.1; attention over ranks has none"),
    "partial": (lambda q, k, v: tr.attention(q, k, v, partial_dtype="half"), "partial_dtype is 'half'"),
    "backward": (
        lambda q, k, v: tr.attention(q, k, v, backward_schedule="rings"),
        r"one of auto, ring, ring:direct, biring, tokenring, gather",
    ),
    "kernel": (lambda q, k, v: tr.attention(q, k, v, kernel="magic"), r"one of auto, cpu_flash, reference"),
    "kernel limits": (lambda q, k, v: tr.attention(q, k, v, kernel="cpu_flash", softcap=1.0), r"has no softcap"),
    "sinks": (lambda q, k, v: tr.attention(q, k, v, sinks=torch.zeros(3)), r"one logit for each of the 4"),
    "softcap": (lambda q, k, v: tr.attention(q, k, v, softcap=0.0), r"must be above 0"),
    "endless softcap": (lambda q, k, v: tr.attention(q, k, v, softcap=float("inf")), r"above 0 and finite"),
    "no scale": (lambda q, k, v: tr.attention(q, k, v, scale=float("nan")), r"scale is nan; it must be above 0"),
    "group": (lambda q, k, v: tr.attention(q, k, v, group="world"), r"give a ProcessGroup"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_refused_before_anything_is_sent(case: str) -> None:
    call, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call(*random_qkv(1, 4, 4, 2, 8, torch.float32))


def test_more_queries_than_keys_need_no_alignment_under_a_full_mask() -> None:
    qkv = random_qkv(1, 12, 2, 1, 8, torch.float64, kv_length=4)
    layout, kv_layout = tr.Layout.zigzag(12, 2), tr.Layout.contiguous(4, 2)
    results = tr.run_local(2, attend, qkv, layout, kv_layout, {"mask": "full"})
    assert_equal_to_dense(results, dense_attention(*qkv, torch.ones(12, 4, dtype=torch.bool)), layout, 1e-12)
    with pytest.raises(ValueError, match="cannot align bottom-right"):
        tr.attention(*qkv, kv_layout="zigzag", mask="causal")


def test_arguments_that_differ_from_the_plan_are_refused_and_equal_ones_taken() -> None:
    qkv = random_qkv(1, 4, 2, 2, 8, torch.float32)
    shape = tr.AttentionShape(1, 4, 4, 2, 2, 8, dtype=torch.float32)
    plan = tr.plan("ring", world=1, shape=shape, layout="contiguous", mask="full")
    alike = {
        "layout": "contiguous",
        "kv_layout": tr.Layout.contiguous(4, 1),
        "mask": tr.Mask.full(),
        "schedule": "ring",
    }
    assert torch.equal(tr.attention(*qkv, plan=plan, **alike), tr.attention(*qkv, plan=plan))
    for name, value in (
        ("layout", tr.Layout.contiguous(5, 1)),
        ("kv_layout", tr.Layout.contiguous(5, 1)),
        ("mask", tr.Mask.window(1)),
        ("schedule", "gather"),
    ):
        with pytest.raises(ValueError, match=f"{name}= differs from that of the plan"):
            tr.attention(*qkv, plan=plan, **{name: value})


def test_a_call_that_fails_half_way_closes_the_group() -> None:
    """Its receives may still be posted: the next call's rows would land in them."""
    layout = tr.Layout.zigzag(8, 2)

    def fail_once(group: Any) -> str:
        local = [layout.shard(x, group.rank()) for x in random_qkv(1, 8, 2, 2, 8, torch.float32)]
        # The rank that fails second may hear of the first before it fails itself.
        with pytest.raises((ZeroDivisionError, tr.TransportError), match="division"):
            tr.attention(*local, group=group, schedule="ring")
        with pytest.raises(tr.TransportError, match="cannot be used again") as refused:
            tr.attention(*local, group=group, schedule="ring")
        return str(refused.value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor.Running, "_compute", lambda *_: 1 / 0)
        messages = tr.run_local(2, fail_once)
    assert all("division" in message for message in messages)


def test_a_plan_for_another_shape_or_world_is_refused() -> None:
    qkv = random_qkv(1, 4, 2, 2, 8, torch.float32)
    shape = tr.AttentionShape(1, 4, 4, 2, 2, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="plan is for 2 ranks and the group has 1"):
        tr.attention(*qkv, plan=tr.plan("ring", world=2, shape=shape, layout="zigzag"))
    with pytest.raises(ValueError, match="build the plan for these shapes"):
        tr.attention(*(x.double() for x in qkv), plan=tr.plan("ring", world=1, shape=shape, layout="zigzag"))

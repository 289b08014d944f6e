"""Gradients over ranks against autograd through dense attention in float64."""

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
from tokenring.kernels import KERNELS
from tokenring.segments import Tile

SCHEDULES = ("ring:direct", "biring", "tokenring", "gather")
LAYOUTS = ("contiguous", "zigzag", "striped")


def dense_gradients(
    qkv: tuple, allowed: torch.Tensor, grad: torch.Tensor, sinks: torch.Tensor | None = None, **options: Any
) -> tuple:
    leaves = [x.double().detach().requires_grad_() for x in qkv]
    extra = [] if sinks is None else [sinks.double().detach().requires_grad_()]
    out, _ = dense_attention(*leaves, allowed, sinks=extra[0] if extra else None, **options)
    return torch.autograd.grad(out, [*leaves, *extra], grad.double())


def differentiate(
    group: Any, qkv: tuple, grad: torch.Tensor, layout: tr.Layout, kv_layout: tr.Layout, options: dict
) -> tuple:
    """This rank's gradients, and the bytes it sent to each peer in the backward pass."""
    rank = group.rank()
    leaves = [cut.shard(x, rank).detach().requires_grad_() for cut, x in zip((layout, kv_layout, kv_layout), qkv)]
    sinks = options.get("sinks")
    options = options | ({} if sinks is None else {"sinks": sinks.detach().requires_grad_()})
    out = tr.attention(*leaves, group=group, layout=layout, kv_layout=kv_layout, **options)
    wanted = [*leaves, *([] if sinks is None else [options["sinks"]])]
    with tr.count_traffic(group) as traffic:
        grads = torch.autograd.grad(out, wanted, layout.shard(grad, rank))
    return grads, {peer: size for (_, peer), size in traffic.sent.items()}


def assert_gradients(results: list, expected: tuple, layouts: tuple, tolerance: float) -> None:
    for rank, (grads, _) in enumerate(results):
        for cut, got, want in zip(layouts, grads, expected):
            torch.testing.assert_close(got.double(), cut.shard(want, rank), rtol=0, atol=tolerance)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_equal_those_of_dense_attention(world: int, schedule: str) -> None:
    for length, forward in ((1, "ring"), (7, "tokenring"), (16, "gather"), (29, "ring")):
        qkv = random_qkv(2, length, 4, 2, 8, torch.float64, seed=length)
        grad = random_qkv(2, length, 4, 2, 8, torch.float64, seed=99)[0]
        for mask in (tr.Mask.causal(), tr.Mask.full(), tr.Mask.window(5)):
            expected = dense_gradients(qkv, mask.dense(torch.arange(length), torch.arange(length)), grad)
            for name in LAYOUTS:
                layout = getattr(tr.Layout, name)(length, world)
                options = {"mask": mask, "schedule": forward, "backward_schedule": schedule}
                results = tr.run_local(world, differentiate, qkv, grad, layout, layout, options)
                assert_gradients(results, expected, (layout,) * 3, 1e-12)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ranks_in_processes_agree_and_send_the_planned_bytes(pool: Pool, world: int, schedule: str) -> None:
    qkv = random_qkv(1, 37, 8, 2, 16, torch.float64)
    grad = random_qkv(1, 37, 8, 2, 16, torch.float64, seed=5)[0]
    layout = tr.Layout.zigzag(37, world)
    options = {"schedule": "tokenring", "backward_schedule": schedule}
    results = pool.run(world, differentiate, qkv, grad, layout, layout, options)
    expected = dense_gradients(qkv, tr.Mask.causal().dense(torch.arange(37), torch.arange(37)), grad)
    assert_gradients(results, expected, (layout,) * 3, 1e-12)
    shape = tr.AttentionShape(1, 37, 37, 8, 2, 16, dtype=torch.float64)
    plan = tr.plan(schedule, world=world, shape=shape, layout=layout, direction="backward")
    for rank, (_, sent) in enumerate(results):
        assert sent == {d: plan.bytes_sent(rank, d) for d in range(world) if plan.bytes_sent(rank, d)}


@given(data=st.data())
@with_settings(max_examples=40)
def test_any_shape_layout_and_option_has_the_dense_gradients(data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 5), "world")
    kv_length = data.draw(st.integers(1, 30), "keys")
    length = data.draw(st.integers(1, kv_length), "queries")
    kv_heads, repeat = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 3]))
    layout = getattr(tr.Layout, data.draw(st.sampled_from(LAYOUTS)))(length, world)
    kv_layout = getattr(tr.Layout, data.draw(st.sampled_from(LAYOUTS)))(kv_length, world)
    mask = data.draw(st.sampled_from([tr.Mask.causal(), tr.Mask.full(), tr.Mask.window(3)]))
    backward = data.draw(st.sampled_from((*SCHEDULES, "auto")))
    extra = data.draw(
        st.sampled_from([{}, {"scale": 0.3}, {"softcap": 1.5}, {"sinks": torch.linspace(-1, 2, kv_heads * repeat)}])
    )
    extra = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in extra.items()}
    qkv = random_qkv(
        1, length, kv_heads * repeat, kv_heads, 4, torch.float64, kv_length=kv_length, v_dim=6, seed=length
    )
    grad = random_qkv(1, length, kv_heads * repeat, 1, 6, torch.float64, seed=3)[0]
    options = {"mask": mask, "backward_schedule": backward, **extra}
    results = tr.run_local(world, differentiate, qkv, grad, layout, kv_layout, options)
    start = 0 if mask == tr.Mask.full() else kv_length - length
    allowed = mask.dense(torch.arange(start, start + length), torch.arange(kv_length))
    expected = dense_gradients(qkv, allowed, grad, **extra)
    assert_gradients(results, expected[:3], (layout, kv_layout, kv_layout), 1e-12)
    if "sinks" in extra:
        torch.testing.assert_close(sum(grads[3] for grads, _ in results), expected[3], rtol=0, atol=1e-12)


def test_riding_gradients_weigh_one_hop_more_and_are_float32() -> None:
    rows, world = 2 * 64 // 4, 4
    kv = 2 * rows * 2 * 16 * 2
    shape = tr.AttentionShape(2, 64, 64, 8, 2, 16)
    plan = tr.plan("ring", world=world, shape=shape, layout="zigzag", mask="full", direction="backward")
    for rank in range(world):
        assert plan.bytes_sent(rank) == plan.bytes_sent(rank, (rank + 1) % world) == (world - 1) * kv + world * 2 * kv
    assert tr.plan("ring", world=1, shape=shape, layout="zigzag", direction="backward").bytes_sent(0) == 0


def test_grids_send_what_the_closed_formulas_say() -> None:
    """Full mask, four key heads over 2 or 4 ranks: no head range is split."""
    batch, heads, kv_heads, dim, length = 2, 8, 4, 16, 48
    for world, a, b in ((4, 2, 2), (6, 3, 2), (6, 2, 3), (8, 4, 2), (8, 2, 4)):
        rows = batch * length // world
        q, kv, lse = rows * heads * dim * 2, 2 * rows * kv_heads * dim * 2, rows * heads * 4
        shape = tr.AttentionShape(batch, length, length, heads, kv_heads, dim)
        forward, backward = (a - 1) * (2 * q + lse) + (b - 1) * kv, (a - 1) * (3 * q + 2 * lse) + (b - 1) * 2 * kv
        cases = {("forward", f"mesh:{a}x{b}"): forward, ("backward", f"mesh:{a}x{b}"): backward}
        cases["forward", f"hybrid:ring/tokenring@{a}"] = (b - 1) * kv + b * (a - 1) * (2 * q + lse)
        cases["backward", f"hybrid:ring/tokenring@{a}"] = (b - 1) * 2 * kv + b * (a - 1) * (3 * q + 2 * lse)
        if kv_heads % a == 0:
            cases["forward", f"usp:{a}x{b}"] = (a - 1) * (2 * q + lse + kv) // a + (b - 1) * kv
            cases["backward", f"usp:{a}x{b}"] = (a - 1) * (3 * q + 2 * lse + 2 * kv) // a + (b - 1) * 2 * kv
        for (direction, name), expected in cases.items():
            plan = tr.plan(name, world=world, shape=shape, layout="contiguous", mask="full", direction=direction)
            assert [plan.bytes_sent(r) for r in range(world)] == [expected] * world, (name, direction)


def test_full_mask_bytes_equal_the_closed_formulas() -> None:
    batch, heads, kv_heads, dim, world, length = 2, 8, 2, 16, 4, 64
    rows = batch * length // world
    q, kv, lse = rows * heads * dim * 2, 2 * rows * kv_heads * dim * 2, rows * heads * 4
    shape = tr.AttentionShape(batch, length, length, heads, kv_heads, dim)
    for partial, factor in ((None, 1), (torch.float32, 2)):
        for name, each in (
            ("ring:direct", kv + kv * factor),
            ("gather", kv + kv * factor),
            ("tokenring", 2 * q + 2 * lse + q * factor),
        ):
            plan = tr.plan(
                name,
                world=world,
                shape=shape,
                layout="zigzag",
                mask="full",
                direction="backward",
                partial_dtype=partial,
            )
            assert [plan.bytes_sent(r) for r in range(world)] == [(world - 1) * each] * world, name


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_backward_plans_are_proven(schedule: str) -> None:
    for world in (1, 2, 3, 5, 8):
        for length in (1, 6, 29):
            for name in LAYOUTS:
                for mask in (tr.Mask.causal(), tr.Mask.full(), tr.Mask.window(4)):
                    layout = getattr(tr.Layout, name)(length, world)
                    shape = tr.AttentionShape(1, length, length, 2, 1, 8)
                    plan = tr.plan(schedule, world=world, shape=shape, layout=layout, mask=mask, direction="backward")
                    assert plan.check().pairs == int(mask.dense(torch.arange(length), torch.arange(length)).sum())


def test_auto_moves_queries_backward_for_equal_heads_and_keys_for_grouped_ones() -> None:
    for kv_heads, best in ((8, "tokenring"), (2, "ring:direct")):
        shape = tr.AttentionShape(1, 64, 64, 8, kv_heads, 128)
        plan = tr.plan("auto", world=4, shape=shape, layout="zigzag", mask="full", direction="backward")
        assert plan.schedule == best


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradient_error_stays_within_twice_one_ranks_and_does_not_grow_with_the_world(
    dtype: torch.dtype, schedule: str
) -> None:
    qkv = random_qkv(1, 96, 4, 2, 32, dtype)
    grad = random_qkv(1, 96, 4, 2, 32, dtype, seed=7)[0]
    exact = dense_gradients(qkv, tr.Mask.causal().dense(torch.arange(96), torch.arange(96)), grad)

    def errors(world: int) -> list[float]:
        layout = tr.Layout.zigzag(96, world)
        results = tr.run_local(world, differentiate, qkv, grad, layout, layout, {"backward_schedule": schedule})
        assert results[0][0][0].dtype == dtype
        pairs = [(g.double(), layout.shard(e, r)) for r, (grads, _) in enumerate(results) for g, e in zip(grads, exact)]
        return [max((g - e).abs().max().item() for g, e in pairs[i::3]) for i in range(3)]

    alone = errors(1)
    for world in (2, 5, 8):
        assert all(error <= 2 * own + 1e-6 for error, own in zip(errors(world), alone)), (world, errors(world), alone)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_every_kernel_differentiates_every_band(kernel: Any) -> None:
    for rows, keys in ((1, 1), (7, 5), (30, 40), (265, 40)):
        for lower, upper in ((None, None), (None, 0), (None, 3), (-2, None), (-3, 2)):
            tile = Tile(0, rows, 0, keys, lower, upper).trim()
            if tile is None:
                continue
            q, k, v = random_qkv(2, rows, 6, 2, 8, torch.float64, kv_length=keys)
            grad = random_qkv(2, rows, 6, 2, 8, torch.float64, seed=1)[0]
            difference = torch.arange(keys)[None] - torch.arange(rows)[:, None]
            allowed = (difference >= (lower if lower is not None else -rows)) & (
                difference <= (upper if upper is not None else keys)
            )
            out, lse = dense_attention(q, k, v, allowed)
            delta = (out * grad).sum(-1).transpose(1, 2)
            span = (tile.q_start, tile.q_stop), (tile.k_start, tile.k_stop)
            got = kernel.backward((q, grad, lse, delta), (k, v), [tile], *span, 8**-0.5, None)
            want = dense_gradients((q, k, v), allowed, grad)
            for x, y, (a, b) in zip(got, want, (span[0], span[1], span[1])):
                torch.testing.assert_close(x, y[:, a:b], rtol=0, atol=1e-12)


def test_rows_without_keys_have_zero_gradients() -> None:
    qkv = random_qkv(1, 6, 2, 1, 8, torch.float64)
    layout, kv_layout = tr.Layout.contiguous(6, 3, offset=2), tr.Layout.contiguous(6, 3, offset=5)
    grad = torch.ones_like(qkv[0])
    expected = dense_gradients(qkv, tr.Mask.causal().dense(torch.arange(2, 8), torch.arange(5, 11)), grad)
    for schedule in SCHEDULES:
        options = {"backward_schedule": schedule}
        results = tr.run_local(3, differentiate, qkv, grad, layout, kv_layout, options)
        assert_gradients(results, tuple(e.nan_to_num(0.0) for e in expected), (layout, kv_layout, kv_layout), 1e-12)
        assert (results[0][0][0] == 0).all()

"""Every schedule x mask x layout x grouping x world: proofs, values and gradients against dense attention in float64."""

from __future__ import annotations

from itertools import cycle, pairwise
from typing import Any

import pytest
import torch

import tokenring as tr
from tests.oracle import dense_attention, random_qkv
from tests.pool import Pool
from tests.tokenring.every_schedule import layouts, masks, schedule_names

HEADS = ((8, 2), (3, 1), (6, 2), (4, 4), (1, 1), (2, 1))
LENGTH, BATCH = 29, 2


def attend_and_differentiate(
    group: Any, qkv: tuple, grad: torch.Tensor, cuts: tuple, options: dict
) -> tuple[tuple, dict, dict]:
    """(out, lse, dq, dk, dv) of this rank, and the bytes it sent to each peer in either pass."""
    rank = group.rank()
    leaves = [cut.shard(x, rank).detach().requires_grad_() for cut, x in zip(cuts, qkv)]
    kv_layout = None if cuts[0] is cuts[1] else cuts[1]
    with tr.count_traffic(group) as forward:
        out, lse = tr.attention(*leaves, group=group, layout=cuts[0], kv_layout=kv_layout, return_lse=True, **options)
    with tr.count_traffic(group) as backward:
        grads = torch.autograd.grad(out, leaves, cuts[0].shard(grad, rank))
    sent = tuple({peer: size for (_, peer), size in traffic.sent.items()} for traffic in (forward, backward))
    return (out.detach(), lse.detach(), *grads), *sent


def expected_values(qkv: tuple, grad: torch.Tensor, allowed: torch.Tensor) -> tuple:
    """(out, lse, dq, dk, dv) of dense attention; `allowed` may have a batch dim."""
    leaves = [x.double().detach().requires_grad_() for x in qkv]
    matrices = allowed.expand(qkv[0].shape[0], *allowed.shape[-2:])
    parts = [dense_attention(*(x[b : b + 1] for x in leaves), matrix) for b, matrix in enumerate(matrices)]
    out, lse = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad)


def assert_all_close(results: list, expected: tuple, cuts: tuple, what: str) -> None:
    for rank, (values, _, _) in enumerate(results):
        q, kv = cuts
        for name, cut, dim, got, want in zip(
            ("out", "lse", "dq", "dk", "dv"), (q, q, q, kv, kv), (1, 2, 1, 1, 1), values, expected
        ):
            difference = f"{what}, rank {rank}: {name}"
            torch.testing.assert_close(
                got, cut.shard(want, rank, dim), rtol=0, atol=1e-12, msg=lambda m, d=difference: f"{d}\n{m}"
            )


@pytest.mark.parametrize("world", range(1, 9))
def test_values_and_gradients_of_every_schedule_equal_dense_attention(world: int) -> None:
    """Forward and backward schedules walk at different pace, so that any meets any."""
    kinds = cycle(masks(LENGTH, BATCH).items())
    cuts, heads = cycle(layouts(LENGTH, world)), cycle(HEADS)
    forward = schedule_names(world)
    positions = torch.arange(LENGTH)
    for turn, backward in enumerate(schedule_names(world, backward=True) * 2):
        (kind, mask), layout, (q_heads, kv_heads) = next(kinds), next(cuts), next(heads)
        name = forward[(3 * turn + turn // 7) % len(forward)]
        qkv = random_qkv(BATCH, LENGTH, q_heads, kv_heads, 4, torch.float64, v_dim=6, seed=turn)
        grad = random_qkv(BATCH, LENGTH, q_heads, 1, 6, torch.float64, seed=99)[0]
        options = {"mask": mask, "schedule": name, "backward_schedule": backward}
        results = tr.run_local(world, attend_and_differentiate, qkv, grad, (layout, layout, layout), options)
        expected = expected_values(qkv, grad, mask.dense(positions, positions))
        assert_all_close(
            results, expected, (layout, layout), f"{name}, {backward}, {kind}, {layout.name}, {q_heads}:{kv_heads}"
        )


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("backward", [False, True])
def test_every_schedule_is_proven_for_every_mask(world: int, backward: bool) -> None:
    kinds = masks(LENGTH, BATCH)
    positions = torch.arange(LENGTH)
    pairs = {kind: int(mask.dense(positions, positions).sum()) for kind, mask in kinds.items()}
    cuts, heads = cycle(layouts(LENGTH, world)), cycle(HEADS)
    for name in schedule_names(world, backward):
        for kind, mask in kinds.items():
            shape = tr.AttentionShape(BATCH, LENGTH, LENGTH, *next(heads), 4, dtype=torch.float64)
            direction = "backward" if backward else "forward"
            plan = tr.plan(name, world=world, shape=shape, layout=next(cuts), mask=mask, direction=direction)
            assert plan.check().pairs == pairs[kind], (name, kind)


@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_processes_send_just_the_planned_bytes(pool: Pool, world: int) -> None:
    qkv = random_qkv(BATCH, LENGTH, 6, 2, 8, torch.float64)
    grad = random_qkv(BATCH, LENGTH, 6, 2, 8, torch.float64, seed=5)[0]
    layout, mask = tr.Layout.zigzag(LENGTH, world), tr.Mask.spans([(3, 9), (12, 20)])
    expected = expected_values(qkv, grad, mask.dense(torch.arange(LENGTH), torch.arange(LENGTH)))
    shape = tr.AttentionShape(BATCH, LENGTH, LENGTH, 6, 2, 8, dtype=torch.float64)
    forward = schedule_names(world)
    for turn, backward in enumerate(schedule_names(world, backward=True)):
        name = forward[(turn + 1) % len(forward)]
        options = {"mask": mask, "schedule": name, "backward_schedule": backward}
        results = pool.run(world, attend_and_differentiate, qkv, grad, (layout, layout, layout), options)
        assert_all_close(results, expected, (layout, layout), f"{name}, {backward}")
        for side, (schedule, direction) in enumerate(((name, "forward"), (backward, "backward")), start=1):
            plan = tr.plan(schedule, world=world, shape=shape, layout=layout, mask=mask, direction=direction)
            for rank, result in enumerate(results):
                planned = {d: plan.bytes_sent(rank, d) for d in range(world) if plan.bytes_sent(rank, d)}
                assert result[side] == planned, (schedule, direction, rank)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_packed_queries_and_keys_of_other_lengths(world: int) -> None:
    """Documents of 0 to 7 queries against 1 to 9 keys: causal aligns each pair's ends."""
    cu, kv_cu = [0, 4, 4, 11, 13], [0, 9, 12, 19, 20]
    mask = tr.Mask.documents(torch.tensor(cu), kv_cu)
    allowed = torch.zeros(13, 20, dtype=torch.bool)
    for (a, b), (c, d) in zip(pairwise(cu), pairwise(kv_cu)):
        allowed[a:b, c:d] = torch.ones(b - a, d - c).tril(d - c - (b - a)).bool()
    assert torch.equal(mask.dense(torch.arange(13), torch.arange(20)), allowed)
    qkv = random_qkv(1, 13, 4, 2, 4, torch.float64, kv_length=20, v_dim=6)
    grad = random_qkv(1, 13, 4, 1, 6, torch.float64, seed=3)[0]
    q_layout, kv_layout = tr.Layout.zigzag(13, world), tr.Layout.contiguous(20, world)
    expected = expected_values(qkv, grad, allowed)
    for name in schedule_names(world):
        options = {"mask": mask, "schedule": name, "backward_schedule": name}
        results = tr.run_local(world, attend_and_differentiate, qkv, grad, (q_layout, kv_layout, kv_layout), options)
        assert_all_close(results, expected, (q_layout, kv_layout), name)

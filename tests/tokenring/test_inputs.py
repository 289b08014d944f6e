"""Any dtype, any strides, any of the inputs frozen, any grad mode: the gradients of dense attention, as exact as one rank's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenring as tr
from tests.oracle import dense_attention, random_qkv
from tests.tokenring.every_schedule import schedule_names

LENGTH, WORLD, ROWS = 29, 3, 96
LAYOUT = tr.Layout.zigzag(LENGTH, WORLD)
CAUSAL = torch.ones(LENGTH, LENGTH).tril().bool()


def dense_values(qkv: tuple, grad: Tensor, allowed: Tensor = CAUSAL) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) in float64."""
    leaves = [x.double().detach().requires_grad_() for x in qkv]
    out, _ = dense_attention(*leaves, allowed)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.double())


def attend(group: Any, qkv: tuple, grad: Tensor, layout: tr.Layout, options: dict) -> tuple[Tensor, ...]:
    leaves = [layout.shard(x, group.rank()).requires_grad_() for x in qkv]
    out = tr.attention(*leaves, group=group, layout=layout, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, layout.shard(grad, group.rank()))


def errors(qkv: tuple, grad: Tensor, exact: tuple, world: int, options: dict) -> list[tuple[float, float]]:
    """Root mean square and largest error of out, dq, dk, dv over all rows."""
    layout = tr.Layout.zigzag(ROWS, world)
    results = tr.run_local(world, attend, qkv, grad, layout, options)
    found = []
    for got, want in zip(zip(*results), exact):
        assert all(x.dtype == qkv[0].dtype for x in got)
        wrong = torch.cat([(x.double() - layout.shard(want, r)).flatten() for r, x in enumerate(got)])
        found.append((wrong.square().mean().sqrt().item(), wrong.abs().max().item()))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_errors_stay_within_twice_one_ranks_in_every_world(dtype: torch.dtype) -> None:
    """Root mean square within twice at every world, so flat; a single largest value is noisier, and within three times."""
    qkv, grad = random_qkv(1, ROWS, 4, 2, 32, dtype), random_qkv(1, ROWS, 4, 2, 32, dtype, seed=7)[0]
    exact = dense_values(qkv, grad, torch.ones(ROWS, ROWS).tril().bool())
    alone = errors(qkv, grad, exact, 1, {})
    assert all(most < 64 * torch.finfo(dtype).eps for _, most in alone)
    for world in range(2, 9):
        forward, backward = schedule_names(world), schedule_names(world, backward=True)
        for name, back in zip_longest(forward, backward, fillvalue="ring"):
            found = errors(qkv, grad, exact, world, {"schedule": name, "backward_schedule": back})
            for what, got, one in zip(("out", "dq", "dk", "dv"), found, alone):
                where = f"{what} of {name}, {back} on {world} ranks: {got}, one rank {one}"
                assert got[0] <= 2 * one[0] and got[1] <= 3 * one[1], where


def views(qkv: tuple) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Ways in which a tensor of the same values may lie in memory."""
    yield "heads before rows", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "cut out of more heads", lambda x: torch.cat([x, x + 1], dim=2)[:, :, : x.shape[2]]
    yield "every second row", lambda x: x.repeat_interleave(2, dim=1)[:, ::2]
    yield "rows last", lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("schedule", "backward"), [("ring", "ring"), ("tokenring", "tokenring"), ("ulysses", "gather")]
)
def test_any_strides_give_the_same_values(schedule: str, backward: str) -> None:
    qkv = random_qkv(2, LENGTH, 6, 3, 8, torch.float64)
    grad = random_qkv(2, LENGTH, 6, 3, 8, torch.float64, seed=4)[0]
    want = dense_values(qkv, grad)

    def work(group: Any, view: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = [view(LAYOUT.shard(x, group.rank())).detach().requires_grad_() for x in qkv]
        assert any(not x.is_contiguous() for x in leaves)
        options = {"schedule": schedule, "backward_schedule": backward}
        out = tr.attention(*leaves, group=group, layout=LAYOUT, **options)
        return out.detach(), *torch.autograd.grad(out, leaves, view(LAYOUT.shard(grad, group.rank())))

    for name, view in views(qkv):
        for rank, results in enumerate(tr.run_local(WORLD, work, view)):
            for got, whole in zip(results, want):
                expected = LAYOUT.shard(whole, rank)
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_expanded_inputs_and_gradients() -> None:
    """One key head expanded to three, one batch entry to two, and the gradient of a sum, which is one number expanded."""
    q, k, v = random_qkv(1, LENGTH, 6, 1, 8, torch.float64)

    def work(group: Any) -> tuple[Tensor, ...]:
        leaves = [LAYOUT.shard(x, group.rank()).requires_grad_() for x in (q, k, v)]
        wide = [leaves[0].expand(2, -1, -1, -1), *(x.expand(2, -1, 3, -1) for x in leaves[1:])]
        out = tr.attention(*wide, group=group, layout=LAYOUT, schedule="gather")
        return out.detach(), *torch.autograd.grad(out.sum(), leaves)

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, _ = dense_attention(*leaves, CAUSAL)
    want = out.detach().expand(2, -1, -1, -1), *torch.autograd.grad(2 * out.sum(), leaves)
    for rank, results in enumerate(tr.run_local(WORLD, work)):
        for got, whole in zip(results, want):
            torch.testing.assert_close(got, LAYOUT.shard(whole, rank), rtol=0, atol=1e-12)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 2), (0, 1, 2, 3)])
def test_gradients_of_some_inputs_alone(wanted: tuple[int, ...]) -> None:
    """The others are frozen: they have no gradient, and those that have one have the right one."""
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64)
    given = (*random_qkv(1, LENGTH, 4, 2, 8, torch.float64), sinks)
    dense = [x.detach().requires_grad_() for x in given]
    want = torch.autograd.grad(dense_attention(*dense[:3], CAUSAL, sinks=dense[3])[0].sin().sum(), dense)

    def work(group: Any) -> list[Tensor | None]:
        mine = [LAYOUT.shard(x, group.rank()) for x in given[:3]] + [sinks.clone()]
        for at in wanted:
            mine[at].requires_grad_()
        tr.attention(*mine[:3], sinks=mine[3], group=group, layout=LAYOUT).sin().sum().backward()
        return [x.grad for x in mine]

    results = tr.run_local(WORLD, work)
    for at, whole in enumerate(want):
        parts = [grads[at] for grads in results]
        if at not in wanted:
            assert parts == [None] * WORLD
        elif at == 3:
            torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-12)
        else:
            for rank, part in enumerate(parts):
                torch.testing.assert_close(part, LAYOUT.shard(whole, rank), rtol=0, atol=1e-12)


def test_without_gradients_nothing_is_kept() -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, LENGTH, 4, 2, 8, torch.float64))
    dense, _ = dense_attention(q, k, v, CAUSAL)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = tr.attention(q, k, v)
        assert not out.requires_grad and out.is_inference() == (mode is torch.inference_mode)
        torch.testing.assert_close(out, dense.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    """Attention computes in the dtype it is given: what a 16-bit layer hands over is 16-bit already."""
    qkv = random_qkv(1, LENGTH, 4, 2, 8, dtype)
    grad = random_qkv(1, LENGTH, 4, 2, 8, dtype, seed=3)[0]
    sinks = torch.linspace(-1, 1, 4, dtype=dtype)

    def work(group: Any, enabled: bool) -> tuple[Tensor, ...]:
        leaves = [LAYOUT.shard(x, group.rank()).requires_grad_() for x in qkv]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out, lse = tr.attention(*leaves, sinks=sinks, group=group, layout=LAYOUT, return_lse=True)
            return out.detach(), lse, *torch.autograd.grad(out, leaves, LAYOUT.shard(grad, group.rank()))

    for plain, cast in zip(tr.run_local(WORLD, work, False), tr.run_local(WORLD, work, True)):
        assert all(torch.equal(a, b) for a, b in zip(plain, cast))


def test_a_16_bit_layer_under_autocast_feeds_it() -> None:
    layer = torch.nn.Linear(32, 3 * 32)
    x = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = layer(x).unflatten(-1, (3, 4, 8)).unbind(2)
        out = tr.attention(q, k, v)
        with pytest.raises(
            ValueError, match=r"got q torch.bfloat16 on cpu, k torch.float32 on cpu.*give one floating dtype"
        ):
            tr.attention(q, k.float(), v)
    assert out.dtype == torch.bfloat16
    dense, _ = dense_attention(q, k, v, CAUSAL)
    torch.testing.assert_close(out.double(), dense, rtol=0, atol=2e-2)
    out.float().square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("backward", ["ring", "ring:direct", "biring", "tokenring", "gather", "mesh:5x1", "ulysses"])
def test_ranks_without_rows_attend_and_differentiate(backward: str) -> None:
    """Two rows on five ranks: three ranks hold nothing, and give and take empty tensors."""
    qkv = random_qkv(2, 2, 5, 5, 8, torch.float32)
    grad = random_qkv(2, 2, 5, 5, 8, torch.float32, seed=8)[0]
    layout, want = tr.Layout.contiguous(2, 5), dense_values(qkv, grad, torch.ones(2, 2).tril().bool())
    options = {"schedule": backward.replace(":direct", ""), "backward_schedule": backward}
    results = tr.run_local(5, attend, qkv, grad, layout, options)
    assert [values[0].shape[1] for values in results] == [1, 1, 0, 0, 0]
    for rank, values in enumerate(results):
        for got, whole in zip(values, want):
            torch.testing.assert_close(got.double(), layout.shard(whole, rank), rtol=0, atol=1e-6)

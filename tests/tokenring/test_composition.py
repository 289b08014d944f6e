"""Attention beside what a model brings along: meshes, one plan for all layers, modes that watch operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tokenring as tr
from tests.oracle import dense_attention, random_qkv
from tests.pool import Pool
from tests.tokenring.meshes import make_mesh, two_axes
from tokenring import call as calls
from tokenring.plans.spec import plan_tensor

LENGTH, WORLD = 29, 3
LAYOUT = tr.Layout.zigzag(LENGTH, WORLD)
CAUSAL = torch.ones(LENGTH, LENGTH).tril().bool()


def train_on_a_mesh(_group: Any) -> dict[str, Any]:
    """Other sequences on dp, other rows on cp: attention, gather, loss, counting and preparing, all on one axis."""
    mesh = two_axes()
    cp, replica = mesh["cp"], mesh["dp"].get_local_rank()
    rank, layout = cp.get_local_rank(), tr.Layout.striped(LENGTH, cp.size())
    qkv = random_qkv(2, LENGTH, 4, 2, 8, torch.float64, seed=replica)
    leaves = [layout.shard(x, rank).requires_grad_() for x in qkv]
    shape = tr.AttentionShape(2, LENGTH, LENGTH, 4, 2, 8, dtype=torch.float64)
    plan = tr.plan("tokenring", world=4, shape=shape, layout=layout)
    tr.prepare(cp, plan)
    with tr.count_traffic(cp) as traffic:
        out = tr.attention(*leaves, group=cp, plan=plan)
    whole = layout.gather(out, cp)
    labels = torch.arange(2 * LENGTH).view(2, LENGTH) % 32
    loss = tr.cross_entropy(out.flatten(2), layout.shard_labels(labels, rank), cp)
    grads = torch.autograd.grad(loss, leaves)
    with pytest.raises(ValueError, match=r"group is a 2-D DeviceMesh; give one axis of it, for instance mesh\['cp'\]"):
        tr.attention(*leaves, group=mesh, layout=layout)
    planned = plan.bytes_sent(rank)
    return {
        "at": (replica, rank),
        "whole": whole.detach(),
        "loss": loss.detach(),
        "grads": grads,
        "bytes": (sum(traffic.sent.values()), planned, sum(traffic.control.values())),
    }


def test_one_axis_of_a_mesh_is_a_group_everywhere(pool: Pool) -> None:
    pool.run(8, make_mesh)
    layout = tr.Layout.striped(LENGTH, 4)
    labels = torch.arange(2 * LENGTH).view(2, LENGTH) % 32
    want = []
    for replica in range(2):
        leaves = [x.requires_grad_() for x in random_qkv(2, LENGTH, 4, 2, 8, torch.float64, seed=replica)]
        out, _ = dense_attention(*leaves, CAUSAL)
        loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(2).flatten(0, 1), labels[:, 1:].flatten())
        want.append((out.detach(), loss.detach(), torch.autograd.grad(loss, leaves)))
    for found in pool.run(8, train_on_a_mesh):
        replica, rank = found["at"]
        out, loss, grads = want[replica]
        torch.testing.assert_close(found["whole"], out, rtol=0, atol=1e-12)
        torch.testing.assert_close(found["loss"], loss, rtol=0, atol=1e-12)
        for got, grad in zip(found["grads"], grads):
            torch.testing.assert_close(got, layout.shard(grad, rank), rtol=0, atol=1e-12)
        sent, planned, control = found["bytes"]
        assert sent == planned > 0 == control


def test_layers_share_what_was_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five layers by names, by objects, by a plan and by a plan as a tensor: the first of each plans, no other does."""
    made: list[str] = []
    for name in ("plan_for", "choose_plan"):
        original = getattr(calls, name)
        monkeypatch.setattr(calls, name, lambda *a, f=original, n=name: made.append(n) or f(*a))
    calls._ready.cache_clear()
    shape = tr.AttentionShape(1, 24, 24, 4, 2, 8, dtype=torch.float32)
    plan = tr.plan("ring", world=2, shape=shape, layout="zigzag")
    ways: list[dict] = [
        {},
        {"layout": tr.Layout.zigzag(24, 2), "mask": tr.Mask.causal(), "schedule": "ring"},
        {"plan": plan},
        {"plan": plan_tensor(plan)},
    ]

    def work(group: Any) -> None:
        layout = tr.Layout.zigzag(24, 2)
        for options in ways:
            x = [layout.shard(t, group.rank()).requires_grad_() for t in random_qkv(1, 24, 4, 2, 8, torch.float32)]
            for _ in range(5):
                tr.attention(*x, group=group, **options).sum().backward()

    tr.run_local(2, work)
    assert made.count("plan_for") == 2 * 2, "on each of two ranks once by names and once by objects; a plan needs none"
    assert made.count("choose_plan") == 3 * 2, "gradients: once by names, by objects, by plan; the tensor is that plan"


class Watch(TorchDispatchMode):
    """Notes every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_lse_has_no_gradient_and_a_second_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 7, 4, 2, 8, torch.float64))
    out, lse = tr.attention(q, k, v, return_lse=True)
    assert out.requires_grad and not lse.requires_grad
    (dq,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.sum().backward()
    with Watch():
        out = tr.attention(q, k, v)
        (dq,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="attention was differentiated twice; its gradient has no gradient"):
            dq.sum().backward()


def watched(group: Any, options: dict) -> tuple:
    """The same call twice, once watched: values and gradients, and what was seen."""
    qkv = random_qkv(1, LENGTH, 4, 2, 8, torch.float64)
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    found = []
    for watch in (None, Watch()):
        leaves = [LAYOUT.shard(x, group.rank()).transpose(1, 2).contiguous().requires_grad_() for x in qkv]
        rows = [x.transpose(1, 2) for x in leaves]
        with watch or torch.enable_grad():
            out, lse = tr.attention(*rows, sinks=sinks, group=group, layout=LAYOUT, return_lse=True, **options)
            grads = torch.autograd.grad(out.sin().sum(), [*leaves, sinks])
        found.append((out.detach(), lse, *grads))
    return found, watch.seen


@pytest.mark.parametrize(
    "options", [{}, {"schedule": "tokenring", "scale": 0.2, "softcap": 3.0, "kernel": "reference"}]
)
def test_a_dispatch_mode_sees_two_operators_and_changes_nothing(pool: Pool, options: dict) -> None:
    for (plain, seen_values), seen in pool.run(WORLD, watched, options):
        assert all(torch.equal(a, b) for a, b in zip(plain, seen_values))
        ours = [name for name in seen if name.startswith("tokenring")]
        assert ours == ["tokenring.attention.default", "tokenring.attention_backward.default"]
        assert not any("flash" in name for name in seen)


def refuse_while_watched(group: Any) -> tuple[str, Tensor]:
    """Rank 1 gives a mask that no text can hold; then all call alike."""
    mine = [LAYOUT.shard(x, group.rank()) for x in random_qkv(1, LENGTH, 4, 2, 8, torch.float64)]
    mask = CAUSAL if group.rank() == 1 else "causal"
    with Watch():
        with pytest.raises(ValueError) as caught:
            tr.attention(*mine, group=group, layout=LAYOUT, mask=mask)
        return str(caught.value), tr.attention(*mine, group=group, layout=LAYOUT)


def test_a_watched_rank_that_refuses_tells_the_others(pool: Pool) -> None:
    dense, _ = dense_attention(*random_qkv(1, LENGTH, 4, 2, 8, torch.float64), CAUSAL)
    for rank, (said, out) in enumerate(pool.run(WORLD, refuse_while_watched)):
        assert ("" if rank == 1 else "rank 1 of 3 refused this call: ") + "mask is a tensor of shape (29, 29)" in said
        torch.testing.assert_close(out, LAYOUT.shard(dense, rank), rtol=0, atol=1e-12)


def test_tensors_that_stand_for_shards_are_refused() -> None:
    class Sharded(Tensor):
        def to_local(self) -> Tensor:
            return self

    x = random_qkv(1, 5, 2, 2, 8, torch.float32)[0]
    with pytest.raises(ValueError, match=r"got a Sharded; attention takes .* plain tensors: give x.to_local\(\)"):
        tr.attention(x.as_subclass(Sharded), x, x)

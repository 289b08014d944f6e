"""A checkpointed block gives the gradients of one that is not; with `save_attention` its recomputation sends nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import tokenring as tr
from tests.oracle import dense_attention
from tests.pool import Pool
from tokenring.checkpoint import attention_operators, save_attention

WORLD, LENGTH, DIM, HEADS, LAYERS = 3, 29, 32, 4, 2
LAYOUT = tr.Layout.zigzag(LENGTH, WORLD)


def own_policy(_ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    kept = op in attention_operators() or op == torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


KINDS: dict[str, Callable[..., Tensor]] = {
    "none": lambda body, x: body(x),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "recomputed": partial(checkpoint, use_reentrant=False),
    "kept": partial(checkpoint, use_reentrant=False, context_fn=save_attention),
    "own policy": partial(
        checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, own_policy)
    ),
}


def parameters() -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(3)
    sizes = ((LAYERS, DIM, 3 * DIM), (LAYERS, DIM, DIM), (2, LENGTH, DIM))
    return tuple(torch.randn(size, generator=make, dtype=torch.float64) / DIM**0.5 for size in sizes)


def network(x: Tensor, qkv: Tensor, mix: Tensor, attend: Callable[..., Tensor], wrap: Callable[..., Tensor]) -> Tensor:
    for layer in range(LAYERS):

        def body(x: Tensor, layer: int = layer) -> Tensor:
            q, k, v = (x @ qkv[layer]).unflatten(-1, (3, HEADS, -1)).unbind(2)
            return x + (attend(q, k, v).flatten(2) @ mix[layer]).tanh()

        x = wrap(body, x)
    return x


def expected() -> tuple[Tensor, ...]:
    qkv, mix, x = (t.requires_grad_() for t in parameters())
    allowed = torch.ones(LENGTH, LENGTH).tril().bool()
    out = network(x, qkv, mix, lambda q, k, v: dense_attention(q, k, v, allowed)[0], KINDS["none"])
    out.square().sum().backward()
    return out.detach(), x.grad, qkv.grad, mix.grad


def train(group: Any, kind: str, backend: str | None = None) -> tuple:
    """(out, dx, dqkv, dmix) of this rank, and (payload, control) bytes of either pass."""
    qkv, mix, x = parameters()
    qkv, mix, x = (t.requires_grad_() for t in (qkv, mix, LAYOUT.shard(x, group.rank())))
    attend = partial(tr.attention, group=group, layout=LAYOUT, schedule="ring", backward_schedule="ring:direct")
    run = partial(network, attend=attend, wrap=KINDS[kind])
    if backend is not None:
        torch._dynamo.reset()
        run = torch.compile(run, backend=backend, fullgraph=True)
    with tr.count_traffic(group) as forward:
        out = run(x, qkv, mix)
    with tr.count_traffic(group) as backward:
        out.square().sum().backward()
    sent = [(sum(t.sent.values()), sum(t.control.values())) for t in (forward, backward)]
    return (out.detach(), x.grad, qkv.grad, mix.grad), *sent


def assert_values(results: list) -> None:
    out, dx, *weights = expected()
    for rank, ((got, got_dx, *_), _, _) in enumerate(results):
        torch.testing.assert_close(got, LAYOUT.shard(out, rank), rtol=0, atol=1e-11)
        torch.testing.assert_close(got_dx, LAYOUT.shard(dx, rank), rtol=0, atol=1e-11)
    for at, want in enumerate(weights, start=2):
        torch.testing.assert_close(sum(values[at] for values, _, _ in results), want, rtol=0, atol=1e-11)


def plans() -> tuple[tr.Plan, tr.Plan]:
    shape = tr.AttentionShape(2, LENGTH, LENGTH, HEADS, HEADS, DIM // HEADS, dtype=torch.float64)
    forward = tr.plan("ring", world=WORLD, shape=shape, layout=LAYOUT)
    return forward, tr.plan("ring:direct", world=WORLD, shape=shape, layout=LAYOUT, direction="backward")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_checkpointed_block_and_what_its_recomputation_sends(pool: Pool, kind: str) -> None:
    results = pool.run(WORLD, train, kind)
    assert_values(results)
    forward, backward = plans()
    again = kind in ("reentrant", "recomputed")
    for rank, (_, (sent, control), (sent_back, control_back)) in enumerate(results):
        assert sent == LAYERS * forward.bytes_sent(rank)
        assert sent_back == LAYERS * (backward.bytes_sent(rank) + again * forward.bytes_sent(rank))
        assert control > 0 and control_back == (1 + again) * control


@pytest.mark.parametrize("kind", ["recomputed", "kept"])
def test_a_compiled_block_recomputes_and_sends_the_same(pool: Pool, kind: str) -> None:
    results = pool.run(WORLD, train, kind, "aot_eager")
    assert_values(results)
    forward, backward = plans()
    for rank, (_, (sent, control), (sent_back, control_back)) in enumerate(results):
        again = kind == "recomputed"
        assert sent == LAYERS * forward.bytes_sent(rank)
        assert sent_back == LAYERS * (backward.bytes_sent(rank) + again * forward.bytes_sent(rank))
        assert control > 0 and control_back == (1 + again) * control


@pytest.mark.parametrize("kind", ["reentrant", "recomputed", "kept"])
def test_ranks_as_threads_recompute_too(kind: str) -> None:
    """A LocalGroup has no name for an operator to carry, so `save_attention` keeps nothing there, and is still right."""
    results = tr.run_local(WORLD, train, kind)
    assert_values(results)
    forward, backward = plans()
    for rank, (_, _, (sent_back, _)) in enumerate(results):
        assert sent_back == LAYERS * (backward.bytes_sent(rank) + forward.bytes_sent(rank))


@pytest.mark.parametrize("kept", [False, True])
def test_saved_tensors_may_be_kept_elsewhere(kept: bool) -> None:
    """Offloading hooks see what attention saves, and what they give back is what the gradient is made of."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, heads, 8, generator=make, requires_grad=True) for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=make, requires_grad=True)
    want = torch.autograd.grad(tr.attention(q, k, v, sinks=sinks).sin().sum(), (q, k, v, sinks))
    store: list[Tensor] = []

    def pack(x: Tensor) -> int:
        store.append(x.detach().clone())
        return len(store) - 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tr.attention(q, k, v, sinks=sinks).sin()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda at: store[at]):
        out = KINDS["kept"](lambda q: attend(q, k, v), q) if kept else attend(q, k, v)
    assert len(store) >= (1 if kept else 6)
    got = torch.autograd.grad(out.sum(), (q, k, v, sinks))
    for a, b in zip(got, want):
        assert torch.equal(a, b)


def test_kept_attention_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenring import executor

    ran: list[str] = []
    run = executor.run
    monkeypatch.setattr(executor, "run", lambda plan, *args: ran.append(plan.direction) or run(plan, *args))
    x = torch.randn(1, 9, 2, 8, requires_grad=True)
    for kind, passes in (("recomputed", ["forward", "forward", "backward"]), ("kept", ["forward", "backward"])):
        ran.clear()
        KINDS[kind](lambda x: tr.attention(x, x, x).sin(), x).sum().backward()
        assert ran == passes, kind

"""`torch.compile` takes attention whole: the same values and gradients as dense attention, and new graphs only where needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import tokenring as tr
from tests.oracle import dense_attention, random_qkv
from tests.pool import Pool
from tests.tokenring.meshes import make_mesh, two_axes
from tokenring.operators import attention as operator
from tokenring.plans.spec import plan_tensor
from tokenring.topology import Topology
from tokenring.transport.inprocess import LocalWorld

LENGTH = 29


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def expected(qkv: tuple, grad: Tensor, mask: tr.Mask, sinks: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv, d_sinks of sin(dense attention of 2 q, k + 1, v)."""
    leaves = [x.detach().requires_grad_() for x in (*qkv, sinks)]
    q, k, v, s = leaves
    positions = torch.arange(LENGTH)
    out, lse = dense_attention(2 * q, k + 1, v, mask.dense(positions, positions), sinks=s, **options)
    return out.sin().detach(), lse.detach(), *torch.autograd.grad(out.sin(), leaves, grad)


def step(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, group: Any, options: dict) -> tuple[Tensor, Tensor]:
    out, lse = tr.attention(2 * q, k + 1, v, sinks=sinks, group=group, return_lse=True, **options)
    return out.sin(), lse


def inputs() -> tuple[tuple, Tensor, Tensor]:
    qkv = random_qkv(2, LENGTH, 4, 2, 8, torch.float64)
    return qkv, random_qkv(2, LENGTH, 4, 2, 8, torch.float64, seed=9)[0], torch.linspace(-1, 1, 4, dtype=torch.float64)


def differentiate(group: Any, layout: tr.Layout, options: dict, backend: Any) -> tuple[Tensor, ...]:
    """This rank's out, lse and gradients, compiled without a break; None as backend: not compiled."""
    torch._dynamo.reset()
    qkv, grad, sinks = inputs()
    leaves = [layout.shard(x, group.rank() if group else 0).requires_grad_() for x in qkv]
    sinks = sinks.requires_grad_()
    run = torch.compile(step, backend=backend, fullgraph=True) if backend else step
    out, lse = run(*leaves, sinks, group, options)
    assert not lse.requires_grad
    grads = torch.autograd.grad(out, [*leaves, sinks], layout.shard(grad, group.rank() if group else 0))
    return out.detach(), lse, *grads


def assert_dense(results: list, layout: tr.Layout, want: tuple[Tensor, ...]) -> None:
    for rank, got in enumerate(results):
        for x, y, dim in zip(got, want[:5], (1, 2, 1, 1, 1)):
            torch.testing.assert_close(x, layout.shard(y, rank, dim), rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(got[5] for got in results), want[5], rtol=0, atol=1e-12)


MASKS = {
    "causal": "causal",
    "window": tr.Mask.window(5),
    "documents": tr.Mask.documents([0, 11, 12, LENGTH]),
    "spans": tr.Mask.spans([(3, 8), (20, 27)]),
}


@pytest.mark.parametrize("kind", MASKS)
def test_one_rank_compiled_equals_dense_attention(kind: str) -> None:
    qkv, grad, sinks = inputs()
    layout, options = tr.Layout.zigzag(LENGTH, 1), {"mask": MASKS[kind], "scale": 0.3, "softcap": 2.5}
    want = expected(qkv, grad, tr.Mask.of(MASKS[kind]), sinks, scale=0.3, softcap=2.5)
    assert_dense([differentiate(None, layout, options, "aot_eager")], layout, want)


@pytest.mark.parametrize(("schedule", "backward"), [("tokenring", "ring"), ("mesh:3x1", "biring"), ("auto", "auto")])
def test_ranks_compiled_equal_dense_attention(pool: Pool, schedule: str, backward: str) -> None:
    qkv, grad, sinks = inputs()
    for kind, layout in zip(MASKS, (tr.Layout.zigzag(LENGTH, 3), tr.Layout.striped(LENGTH, 3, block=2)) * 2):
        options = {"mask": MASKS[kind], "layout": layout, "schedule": schedule, "backward_schedule": backward}
        results = pool.run(3, differentiate, layout, options, "aot_eager")
        assert_dense(results, layout, expected(qkv, grad, tr.Mask.of(MASKS[kind]), sinks))


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="inductor needs a C++ compiler")
def test_inductor_compiles_it_over_ranks(pool: Pool) -> None:
    qkv, grad, sinks = inputs()
    layout = tr.Layout.zigzag(LENGTH, 2)
    results = pool.run(2, differentiate, layout, {"layout": layout, "partial_dtype": torch.float64}, "inductor")
    assert_dense(results, layout, expected(qkv, grad, tr.Mask.causal(), sinks))


def some_compiled(group: Any, layout: tr.Layout) -> tuple[Tensor, ...]:
    return differentiate(group, layout, {"layout": layout}, None if group.rank() else "aot_eager")


def test_compiled_and_eager_ranks_make_one_call(pool: Pool) -> None:
    qkv, grad, sinks = inputs()
    layout = tr.Layout.zigzag(LENGTH, 3)
    assert_dense(pool.run(3, some_compiled, layout), layout, expected(qkv, grad, tr.Mask.causal(), sinks))


def make_plan(mask: tr.Mask, length: int = LENGTH) -> tr.Plan:
    shape = tr.AttentionShape(2, length, length, 4, 2, 8, dtype=torch.float64)
    return tr.plan("ring", world=1, shape=shape, layout=tr.Layout.zigzag(length, 1), mask=mask)


@pytest.mark.parametrize(
    ("calls", "new_graphs"),
    [
        ([{"mask": tr.Mask.window(n)} for n in (1, 2, 1)], [1, 1, 0]),
        ([{"plan": make_plan(tr.Mask.window(n))} for n in (1, 2, 1)], [1, 1, 0]),
        ([{"layout": tr.Layout.zigzag(LENGTH, 1, offset)} for offset in (0, 2, 0)], [1, 1, 0]),
        ([{"topology": Topology.mesh(1, rate)} for rate in (10, 20, 10)], [1, 1, 0]),
        ([{"schedule": name} for name in ("ring", "gather", "ring")], [1, 1, 0]),
        ([{"scale": 0.5}, {"scale": 0.25}, {"scale": 0.125}, {"softcap": 3.0}, {"kernel": "reference"}], None),
    ],
)
def test_what_changes_a_call_changes_the_graph_and_what_is_equal_does_not(calls: list, new_graphs: list | None) -> None:
    """Windows of 1 and 2 hash alike, because hash(-1) == hash(-2): a hash would take one for the other."""
    qkv, _, sinks = inputs()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(step, backend=counter, fullgraph=True)
    graphs = []
    for options in calls:
        before = counter.frame_count
        with torch.no_grad():
            for got, want in zip(run(*qkv, sinks, None, options), step(*qkv, sinks, None, options)):
                assert torch.equal(got, want), options
        graphs.append(counter.frame_count - before)
    assert new_graphs in (None, graphs)


def test_a_plan_as_a_tensor_changes_without_a_new_graph() -> None:
    qkv, _, sinks = inputs()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(step, backend=counter, fullgraph=True)
    for count, bounds in enumerate(([0, 29], [0, 3, 29], [0, 9, 10, 29], [0, 1, 2, 3, 4, 29], [0, 28, 29])):
        mask = tr.Mask.documents(bounds)
        packed = plan_tensor(make_plan(mask))
        leaves = [x.detach().requires_grad_() for x in qkv]
        values = []
        for call in (run, step):
            out, lse = call(*leaves, sinks, None, {"plan": packed})
            values.append((out, lse, *torch.autograd.grad(out.sum(), leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*values)), bounds
        positions = torch.arange(LENGTH)
        dense, _ = dense_attention(2 * qkv[0], qkv[1] + 1, qkv[2], mask.dense(positions, positions), sinks=sinks)
        torch.testing.assert_close(values[0][0], dense.sin(), rtol=0, atol=1e-12)
        assert counter.frame_count <= min(count + 1, 2), "one graph for the first length of the text, one for any"


def test_a_graph_takes_any_length() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda q, k, v: tr.attention(q, k, v).sin(), backend=counter, fullgraph=True)
    for length in (8, 12, 17, 30, 5):
        leaves = [x.requires_grad_() for x in random_qkv(1, length, 4, 2, 8, torch.float64, seed=length)]
        out = run(*leaves)
        dense, _ = dense_attention(*leaves, torch.ones(length, length).tril().bool())
        torch.testing.assert_close(out, dense.sin(), rtol=0, atol=1e-12)
        got, want = (torch.autograd.grad(x.sum(), leaves) for x in (out, dense.sin()))
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert counter.frame_count == 2


def on_two_groups(group: Any) -> list[tuple]:
    """One compiled function on one row of a mesh, then on a group of the same ranks, and what each of them sent."""
    torch._dynamo.reset()
    mesh = two_axes()
    layout = tr.Layout.zigzag(LENGTH, 4)
    qkv, _, sinks = inputs()
    mine = [layout.shard(x, group.rank()) for x in qkv]
    run = torch.compile(step, backend="aot_eager", fullgraph=True)
    found = []
    for axis in (mesh["cp"], group, mesh["cp"]):
        with tr.count_traffic(mesh["cp"]) as by_mesh, tr.count_traffic(group) as by_group:
            out, lse = run(*mine, sinks, axis, {"layout": layout})
        found.append((out, lse, sum(by_mesh.sent.values()), sum(by_group.sent.values())))
    with pytest.raises(Exception, match="group is a DeviceMesh of several axes; give one axis of it"):
        run(*mine, sinks, mesh, {})
    return found


def test_a_graph_is_of_one_group(pool: Pool) -> None:
    qkv, grad, sinks = inputs()
    out, lse = expected(qkv, grad, tr.Mask.causal(), sinks)[:2]
    layout = tr.Layout.zigzag(LENGTH, 4)
    pool.run(8, make_mesh)
    for rank, results in enumerate(pool.run(4, on_two_groups)):
        for got, got_lse, *_ in results:
            torch.testing.assert_close(got, layout.shard(out, rank), rtol=0, atol=1e-12)
            torch.testing.assert_close(got_lse, layout.shard(lse, rank, 2), rtol=0, atol=1e-12)
        sent = max(by_mesh for *_, by_mesh, _ in results)
        assert sent > 0 and [tuple(r[2:]) for r in results] == [(sent, 0), (0, sent), (sent, 0)]


def refused(group: Any, odd: dict) -> tuple[str, Tensor]:
    """A compiled call that rank 1 makes with other options, then one that all make alike."""
    torch._dynamo.reset()
    layout = tr.Layout.zigzag(LENGTH, group.size())
    qkv, _, sinks = inputs()
    mine = [layout.shard(x, group.rank()) for x in qkv]
    run = torch.compile(step, backend="aot_eager", fullgraph=True)
    options = {"layout": layout} | (odd if group.rank() == 1 else {})
    with pytest.raises(ValueError) as caught:
        run(*mine, sinks, group, options)
    return f"{type(caught.value).__name__}: {caught.value}", run(*mine, sinks, group, {"layout": layout})[0]


@pytest.mark.parametrize(
    ("odd", "own", "others"),
    [
        ({"mask": "diagonal"}, "ValueError: mask is 'diagonal'", "rank 1 of 3 refused this call: mask is 'diagonal'"),
        ({"scale": 0.5}, "ranks disagree on scale", "ranks disagree on scale"),
        ({"dropout": 0.1}, "ValueError: dropout is 0.1", "rank 1 of 3 refused this call: dropout is 0.1"),
    ],
)
def test_a_compiled_rank_that_refuses_tells_the_others(pool: Pool, odd: dict, own: str, others: str) -> None:
    qkv, grad, sinks = inputs()
    out, layout = expected(qkv, grad, tr.Mask.causal(), sinks)[0], tr.Layout.zigzag(LENGTH, 3)
    for rank, (said, then) in enumerate(pool.run(3, refused, odd)):
        assert (own if rank == 1 else others) in said
        torch.testing.assert_close(then, layout.shard(out, rank), rtol=0, atol=1e-12)


def test_what_a_graph_cannot_hold_is_refused_by_name() -> None:
    qkv, _, sinks = inputs()
    run = torch.compile(step, backend="aot_eager", fullgraph=True)
    for group, options, said in (
        (LocalWorld(1).groups()[0], {}, "threads of one process cannot be found again by name"),
        (None, {"mask": torch.ones(LENGTH, LENGTH)}, "mask is a tensor of shape .29, 29., which a graph cannot hold"),
        (None, {"plan": torch.zeros(3, dtype=torch.uint8)}, "plan is a tensor that holds no plan"),
    ):
        with pytest.raises(Exception, match=said):
            run(*qkv, sinks, group, options)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_without_fullgraph_threads_attend_outside_the_graph() -> None:
    qkv = random_qkv(1, LENGTH, 4, 2, 8, torch.float64)
    run = torch.compile(lambda q, k, v, group: tr.attention(2 * q, k, v, group=group).sin(), backend="aot_eager")
    dense, _ = dense_attention(2 * qkv[0], *qkv[1:], torch.ones(LENGTH, LENGTH).tril().bool())
    torch.testing.assert_close(run(*qkv, LocalWorld(1).groups()[0]), dense.sin(), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_operator_keeps_the_rules_of_torch() -> None:
    """torch's own checks: schema, autograd, shapes without data, dynamic shapes."""
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 7, 4, 2, 8, torch.float32, v_dim=6))
    sinks = torch.randn(4, requires_grad=True)
    turned = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    for case in ((q, k, v, None), (turned, k, v, sinks), (q.detach(), k.detach(), v, sinks)):
        torch.library.opcheck(operator, (*case, None, "", '{"mask":"causal"}', None, 3.0))


def test_export_holds_the_operator_and_its_text() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return tr.attention(q, k, v, mask=tr.Mask.window(3))

    qkv = random_qkv(1, 9, 4, 2, 8, torch.float32)
    program = torch.export.export(Attend(), qkv, strict=False)
    (node,) = [n for n in program.graph.nodes if n.target == torch.ops.tokenring.attention.default]
    assert '"cells":[[0,null,0,null,-3,0]]' in str(node.args)
    torch.testing.assert_close(program.module()(*qkv), Attend()(*qkv))


def test_importing_tokenring_does_not_load_the_compiler() -> None:
    code = "import sys, tokenring; print([m for m in ('torch._dynamo', 'torch._inductor') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"

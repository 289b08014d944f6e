"""Every dispatcher against experts applied densely on one rank, in float64, with different data on every rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe import build_dispatcher
from moe.dispatch import exchange
from tests.moe.cases import Block, Case, H, apply_experts

NAMES = ("allgather", "alltoall", "dedup", "hierarchical")


def on_rank(rank: int, ep_group, etp_group, case: Case, name: str, options: dict, weighted: bool):
    d = build_dispatcher(name, num_experts=case.num_experts, ep_group=ep_group, etp_group=etp_group, **options)
    hidden, ids, weights, d_out = case.inputs(rank)
    hidden, weights = hidden.requires_grad_(), weights.requires_grad_()
    ep_rank, etp_rank = divmod(rank, case.etp)
    local = case.num_experts // case.ep
    matrices = case.experts()[ep_rank * local : (ep_rank + 1) * local]
    rows = torch.zeros_like(matrices)
    rows[:, etp_rank :: case.etp] = 1  # this rank's part of every expert
    matrices = (matrices * rows).requires_grad_()
    sent = d.dispatch(hidden, ids, weights)
    out = apply_experts(sent.tokens, sent.tokens_per_expert, matrices)
    if weighted:
        out = out * sent.weights.unsqueeze(1)
    result = d.combine(out, sent, weighted=weighted)
    (result * d_out).sum().backward()
    return result.detach(), hidden.grad, weights.grad, ep_rank, matrices.grad * rows


def check(case: Case, name: str, weighted: bool = False, **options) -> None:
    outs, d_hidden, d_weights, d_experts = case.dense()
    results = Block(case.ep, case.etp).run(on_rank, case, name, options, weighted)
    local = case.num_experts // case.ep
    found = torch.zeros_like(d_experts)
    for rank, (out, dh, dw, ep_rank, dm) in enumerate(results):
        assert torch.allclose(out, outs[rank], atol=1e-12), (rank, "out")
        assert torch.allclose(dh, d_hidden[rank], atol=1e-12), (rank, "hidden")
        assert torch.allclose(dw, d_weights[rank], atol=1e-12), (rank, "weights")
        found[ep_rank * local : (ep_rank + 1) * local] += dm
    assert torch.allclose(found, d_experts, atol=1e-11)


LAYOUTS = [(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (2, 4), (1, 8), (3, 2)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ep", "etp"), LAYOUTS)
def test_every_dispatcher_equals_dense_experts(name: str, ep: int, etp: int) -> None:
    ragged = tuple(3 + 5 * r % 7 for r in range(ep * etp))
    check(Case(ep, etp, 24, 4, ragged, drop=0.1), name, weighted=ep % 2 == 0)


@pytest.mark.parametrize(("ep", "etp", "per_node"), [(4, 1, 2), (8, 1, 4), (8, 1, 2), (6, 1, 3), (4, 2, 4), (4, 2, 2)])
def test_hierarchical_over_nodes_equals_dense_experts(ep: int, etp: int, per_node: int) -> None:
    case = Case(ep, etp, 24, 5, tuple(r % 4 * 3 for r in range(ep * etp)), drop=0.2)
    check(case, "hierarchical", ranks_per_node=per_node)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "case",
    [
        Case(3, 1, 3, 3, (4, 0, 5)),
        Case(4, 1, 8, 2, (0, 0, 0, 0)),
        Case(4, 1, 8, 2, (0, 0, 6, 0), routing="first_rank"),
        Case(2, 2, 4, 1, (3, 0, 2, 1), routing="one"),
        Case(4, 1, 4, 4, (2, 3, 1, 5)),
        Case(2, 2, 4, 3, (2, 3, 1, 5), drop=1.0),
        Case(2, 1, 600, 20, (9, 4)),
    ],
    ids=["k_is_E", "no_tokens", "one_source", "one_expert", "E_is_ranks", "all_dropped", "two_byte_ids"],
)
def test_edge_rows_are_ordinary(name: str, case: Case) -> None:
    check(case, name)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12)
@given(data=st.data())
def test_any_case_equals_dense_experts(name: str, data) -> None:
    ep, etp = data.draw(st.sampled_from(LAYOUTS))
    experts = ep * data.draw(st.integers(1, 4))
    tokens = tuple(data.draw(st.lists(st.integers(0, 6), min_size=ep * etp, max_size=ep * etp)))
    topk = data.draw(st.integers(1, experts))
    routing = data.draw(st.sampled_from(["uniform", "one", "first_rank"]))
    drop = data.draw(st.sampled_from([0.0, 0.3]))
    options = {"align": data.draw(st.sampled_from([1, 4]))}
    if name == "hierarchical" and ep % 2 == 0:
        options["ranks_per_node"] = 2 * etp
    check(Case(ep, etp, experts, topk, tokens, routing, drop, data.draw(st.integers(0, 99))), name, **options)


def token_ids_on_rank(rank: int, ep_group, etp_group, case: Case, name: str, options: dict):
    d = build_dispatcher(name, num_experts=case.num_experts, ep_group=ep_group, etp_group=etp_group, **options)
    _, ids, weights, _ = case.inputs(rank)
    names = (1000 * rank + torch.arange(ids.shape[0], dtype=torch.float64)).unsqueeze(1).expand(-1, H).contiguous()
    sent = d.dispatch(names, ids, weights)
    assert sent.tokens.shape[0] == int(sent.tokens_per_expert.sum()) and sent.tokens_per_expert.dtype == torch.int64
    owner = torch.arange(d.local_experts).repeat_interleave(sent.tokens_per_expert) + d.first_expert
    return [(int(t), int(e), float(w)) for t, e, w in zip(sent.tokens[:, 0], owner, sent.weights.detach())]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_in_many_pieces_equal_dense_experts(monkeypatch, name: str, rows: int) -> None:
    monkeypatch.setitem(exchange.PIECE_BYTES, "cpu", rows * H * 8)
    check(Case(4, 2, 16, 5, (17, 0, 3, 29, 2, 11, 1, 8), drop=0.2), name, align=4)
    case = Case(4, 1, 16, 3, (23, 5, 0, 14))
    check(case, name, **({"ranks_per_node": 2} if name == "hierarchical" else {}))


@given(data=st.data())
def test_every_row_leaves_once_and_meets_its_other_end(data) -> None:
    world, most = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    rows = [[data.draw(st.integers(0, 9)) for _ in range(world)] for _ in range(world)]  # of rank a for rank b
    onwards = data.draw(st.booleans())
    posted = {}
    for rank in range(world):
        arrive = [rows[other][rank] for other in range(world)]
        for number, step in enumerate(exchange.plan_steps(rank, rows[rank], arrive, most, onwards=onwards)):
            for piece, way in ((step.leaves, "leaves"), (step.arrives, "arrives")):
                if piece is not None:
                    pair = (rank, piece.peer) if way == "leaves" else (piece.peer, rank)
                    posted.setdefault((way, *pair), []).append((number, piece.start, piece.stop))
    for a in range(world):
        for b in range(world):
            there, here = posted.get(("leaves", a, b), []), posted.get(("arrives", a, b), [])
            # the same pieces on both ends, in the same order, and together all rows
            assert [piece[1:] for piece in there] == [piece[1:] for piece in here]
            assert sum(stop - start for _, start, stop in there) == (0 if a == b else rows[a][b])


@pytest.mark.parametrize("name", NAMES)
def test_each_token_reaches_each_of_its_experts_once_and_no_other(name: str) -> None:
    case = Case(4, 2, 16, 5, (7, 0, 3, 9, 2, 5, 1, 8), drop=0.2)
    wanted = []
    for rank in range(8):
        _, ids, weights, _ = case.inputs(rank)
        wanted += [
            (1000 * rank + t, int(e), float(w)) for t, row in enumerate(ids) for e, w in zip(row, weights[t]) if e >= 0
        ]
    options = {"ranks_per_node": 4} if name == "hierarchical" else {}
    arrived = Block(4, 2).run(token_ids_on_rank, case, name, options)
    for etp_rank in range(2):
        assert sorted(entry for e in range(4) for entry in arrived[2 * e + etp_rank]) == sorted(wanted)


def test_filling_is_zero_and_weighs_nothing() -> None:
    d = build_dispatcher("dedup", num_experts=3, align=4)
    sent = d.dispatch(torch.ones(5, 2), torch.tensor([[0], [0], [0], [0], [2]]), torch.ones(5, 1))
    assert sent.tokens_per_expert.tolist() == [4, 0, 4]
    assert sent.tokens[:, 0].tolist() == [1, 1, 1, 1, 1, 0, 0, 0] == sent.weights.tolist()


def half_on_rank(group, name: str) -> tuple[Tensor, Tensor]:
    d = build_dispatcher(name, num_experts=8, ep_group=group)
    draw = torch.Generator().manual_seed(group.rank())
    hidden = torch.randn(50, 16, generator=draw).bfloat16()
    ids = torch.rand(50, 8, generator=draw).argsort(1)[:, :4]
    weights = torch.rand(50, 4, generator=draw)
    sent = d.dispatch(hidden, ids, weights)
    assert sent.tokens.dtype == torch.bfloat16 and sent.weights.dtype == torch.float32
    return d.combine(sent.tokens, sent), (hidden.double() * weights.sum(1, keepdim=True))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_rows_are_summed_in_float32(name: str) -> None:
    from tokenring.transport.inprocess import run_local

    for out, expected in run_local(2, half_on_rank, name):
        assert out.dtype == torch.bfloat16
        # two sums, each rounded once
        assert ((out.double() - expected).abs() <= 2 * 2**-8 * expected.abs() + 1e-2 * 2**-8).all()


def over_processes(group, name: str, options: dict) -> tuple[list, list]:
    case = Case(group.size(), 1, 8, 3, tuple(5 * r for r in range(group.size())))
    return [on_rank(group.rank(), group, None, case, name, options, False)[:3] for _ in range(2)]


@pytest.mark.parametrize(("name", "options"), [*((n, {}) for n in NAMES), ("hierarchical", {"ranks_per_node": 2})])
def test_processes_over_gloo_give_the_same_bits_every_time(pool, name: str, options: dict) -> None:
    case = Case(4, 1, 8, 3, (0, 5, 10, 15))
    outs, d_hidden, d_weights, _ = case.dense()
    for rank, (first, second) in enumerate(pool.run(4, over_processes, name, options)):
        for one, two, expected in zip(first, second, (outs[rank], d_hidden[rank], d_weights[rank])):
            assert torch.equal(one, two) and torch.allclose(one, expected, atol=1e-12)


def idle_expert_on_rank(rank: int, ep_group, etp_group) -> Tensor:
    d = build_dispatcher("dedup", num_experts=2, ep_group=ep_group, etp_group=etp_group)
    hidden = torch.randn(4, H, generator=torch.Generator().manual_seed(rank), requires_grad=rank == 0)
    sent = d.dispatch(hidden, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
    # rank 1 has no tokens and gives a result that hangs on nothing
    out = sent.tokens * 2 if rank == 0 else torch.zeros(sent.tokens.shape)
    d.combine(out, sent).sum().backward()
    return hidden.grad


def test_a_rank_whose_graph_lacks_the_experts_does_not_hang() -> None:
    first, second = Block(2, 1).run(idle_expert_on_rank)
    assert torch.equal(first, torch.full((4, H), 2.0)) and second is None


def wrong_on_one_rank(rank: int, ep_group, etp_group, wrong: str, culprit: int) -> str:
    d = build_dispatcher("dedup", num_experts=4, ep_group=ep_group, etp_group=etp_group)
    hidden, ids, weights = torch.ones(2, H), torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2)
    if rank == culprit:
        if wrong == "ids":
            ids = ids + 1
        elif wrong == "twice":
            ids = torch.zeros_like(ids)
        elif wrong == "width":
            hidden = torch.ones(2, H + 1)
        elif wrong == "dtype":
            hidden = hidden.double()
        elif wrong == "weights":
            weights = torch.ones(2, 3)
        else:
            hidden = torch.ones(H)
    with d.count_traffic() as traffic, pytest.raises(ValueError) as caught:
        d.dispatch(hidden, ids, weights)
    assert not traffic.rows
    good = d.dispatch(torch.ones(2, H), torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2))
    assert torch.equal(d.combine(good.tokens, good), torch.full((2, H), 4.0))  # two parts of each expert
    return str(caught.value)


@pytest.mark.parametrize("culprit", [0, 3])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("ids", "expert_ids reach from 1 to 4; give 0 to 3"),
        ("twice", "names one expert twice"),
        ("weights", "expert_weights is (2, 3)"),
        ("rank", "hidden is (6,)"),
        ("width", "mean different calls"),
        ("dtype", "mean different calls"),
    ],
)
def test_what_is_wrong_on_one_rank_is_refused_on_all_and_the_group_lives_on(
    wrong: str, words: str, culprit: int
) -> None:
    for said in Block(2, 2).run(wrong_on_one_rank, wrong, culprit):
        assert words in said


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dedupe", {}, "dispatcher is 'dedupe'; give one of allgather"),
        ("dedup", {"num_experts": 0}, "num_experts=0"),
        ("dedup", {"align": 0}, "align is 0"),
        ("hierarchical", {"ranks_per_node": 2}, "ranks_per_node=2 does not cut"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_dispatcher(name, **({"num_experts": 4} | options))

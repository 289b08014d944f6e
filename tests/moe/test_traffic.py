"""The byte formulas: against what the counters saw to the byte, against long averages, and the ratios they promise."""

from __future__ import annotations

import pytest
import torch

from moe import build_dispatcher, traffic
from moe.traffic import by_link
from tests.moe.cases import Block, Case, H

NAMES = ("allgather", "alltoall", "dedup", "hierarchical")


def counted_on_rank(rank: int, ep_group, etp_group, case: Case, name: str, options: dict):
    d = build_dispatcher(name, num_experts=case.num_experts, ep_group=ep_group, etp_group=etp_group, **options)
    hidden, ids, weights, d_out = case.inputs(rank)
    hidden, weights = hidden.requires_grad_(), weights.requires_grad_()
    with d.count_traffic() as forward:
        sent = d.dispatch(hidden, ids, weights)
    with d.count_traffic() as back:
        out = d.combine(2 * sent.tokens, sent)
    with d.count_traffic() as backward:
        (out * d_out).sum().backward()
    assert not back.metadata
    return forward.rows, forward.metadata, back.rows, backward.rows


def merged(parts: list[dict]) -> dict:
    return {pair: size for part in parts for pair, size in part.items() if size}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("case", "per_node"),
    [
        (Case(4, 1, 12, 3, (5, 0, 9, 2), drop=0.2), 2),
        (Case(8, 1, 24, 6, (3, 1, 4, 1, 5, 9, 2, 6)), 4),
        (Case(2, 2, 8, 4, (6, 3, 0, 7)), None),
        (Case(4, 2, 400, 9, (6, 3, 0, 7, 2, 2, 5, 1)), 4),
        (Case(1, 3, 8, 4, (6, 3, 1)), None),
        (Case(6, 1, 2400, 5, (6, 3, 1, 4, 4, 4)), 3),
    ],
)
def test_counted_bytes_equal_the_formulas_to_the_byte(name: str, case: Case, per_node: int | None) -> None:
    options = {"ranks_per_node": per_node} if name == "hierarchical" else {}
    forward, metadata, back, backward = zip(*Block(case.ep, case.etp).run(counted_on_rank, case, name, options))
    sizes = {
        "num_experts": case.num_experts,
        "topk": case.topk,
        "ep": case.ep,
        "etp": case.etp,
        "tokens": case.tokens,
        "row_bytes": H * 8,
        "weight_bytes": 8,
        "routing": [case.inputs(rank)[1] for rank in range(case.ep * case.etp)],
        **options,
    }
    there, home = traffic(name, **sizes), traffic(name, direction="combine", **sizes)
    assert merged(forward) == there
    assert merged(back) == home
    assert merged(metadata) == traffic(name, metadata=True, **sizes)
    both = {pair: there.get(pair, 0) + home.get(pair, 0) for pair in there | home}
    assert merged(backward) == both


@pytest.mark.parametrize("name", NAMES)
def test_expected_bytes_are_the_mean_of_uniform_routings(name: str) -> None:
    sizes = {"num_experts": 16, "topk": 3, "ep": 4, "etp": 2, "row_bytes": 1, "ranks_per_node": 4}
    draw = torch.Generator().manual_seed(0)
    routing = [torch.rand(20000, 16, generator=draw).argsort(1)[:, :3] for _ in range(8)]
    expected, exact = traffic(name, tokens=20000, **sizes), traffic(name, tokens=20000, routing=routing, **sizes)
    assert expected.keys() == exact.keys()
    assert all(abs(expected[pair] / exact[pair] - 1) < 0.02 for pair in exact)


def rows_per_token(name: str, world: int, **sizes) -> float:
    return sum(traffic(name, tokens=1, row_bytes=1, **sizes).values()) / world


@pytest.mark.parametrize(
    ("experts", "topk", "ep", "etp", "alltoall", "dedup"),
    [
        (8, 2, 4, 1, 1.5, 1.393),
        (64, 8, 4, 1, 6.0, 2.744),
        (64, 8, 8, 1, 7.0, 4.753),
        (256, 8, 8, 1, 7.0, 4.633),
        (512, 10, 8, 1, 8.75, 5.182),
        (64, 8, 4, 2, 14.0, 6.40),
        (64, 8, 2, 4, 28.0, 6.98),
        (64, 8, 1, 8, 56.0, 7.0),
        (256, 8, 8, 2, 15.0, 9.93),
    ],
)
def test_rows_per_token_of_known_models(
    experts: int, topk: int, ep: int, etp: int, alltoall: float, dedup: float
) -> None:
    sizes = {"num_experts": experts, "topk": topk, "ep": ep, "etp": etp}
    assert rows_per_token("alltoall", ep * etp, **sizes) == pytest.approx(alltoall, abs=0.006)
    assert rows_per_token("dedup", ep * etp, **sizes) == pytest.approx(dedup, abs=0.006)
    assert rows_per_token("allgather", ep * etp, **sizes) == pytest.approx(ep * etp - 1)


def test_the_ratios_the_package_promises() -> None:
    fine = {"num_experts": 64, "topk": 8}

    def ratio(ep: int, etp: int) -> float:
        sizes = fine | {"ep": ep, "etp": etp}
        return rows_per_token("dedup", ep * etp, **sizes) / rows_per_token("alltoall", ep * etp, **sizes)

    assert ratio(4, 1) <= 0.46 and ratio(8, 1) <= 0.69 and ratio(1, 8) <= 0.13
    sizes = fine | {"ep": 16, "tokens": 1, "row_bytes": 1, "ranks_per_node": 8}
    crossing = {name: by_link(traffic(name, **sizes), 8)["between"] for name in NAMES}
    assert crossing["hierarchical"] / crossing["alltoall"] <= 0.26
    assert crossing["dedup"] / 16 == pytest.approx(3.375, abs=1e-3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": "ring"}, "name is 'ring'"),
        ({"ep": 3}, "num_experts=8 is no multiple of ep=3"),
        ({"topk": 9}, "topk is 9"),
        ({"direction": "up"}, "direction is 'up'"),
        ({"metadata": True}, "needs routing="),
        ({"tokens": [1, 2, 3]}, "for 3 ranks"),
        ({"name": "hierarchical", "ranks_per_node": 3}, "ranks_per_node=3"),
    ],
)
def test_wrong_questions_are_named(given: dict, words: str) -> None:
    sizes = {"name": "dedup", "num_experts": 8, "topk": 2, "ep": 4, "tokens": 5, "row_bytes": 2} | given
    with pytest.raises(ValueError, match=words):
        traffic(sizes.pop("name"), **sizes)

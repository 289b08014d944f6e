"""The layer under every folding against the same computed densely on one rank, in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from moe import Folding, MoELayer
from tokenring.transport.inprocess import LocalWorld, run_local

H, F, E, K, BATCH, LENGTH = 8, 8, 8, 3, 8, 8
NAMES = ("dedup", "allgather", "alltoall", "hierarchical", "auto")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def weights_of(stage: int) -> dict[str, Tensor]:
    sizes = {"router": (E, H), "up": (E, H, F), "gate": (E, H, F), "down": (E, F, H), "s_up": (H, F), "s_gate": (H, F)}
    sizes |= {"s_down": (F, H), "s_token": (1, H)}
    return {name: draw(100 * stage + i, *size) for i, (name, size) in enumerate(sizes.items())}


def expert(x: Tensor, up: Tensor, gate: Tensor, down: Tensor) -> Tensor:
    return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down


@functools.cache
def dense(stage: int, factor: float | None) -> dict[str, Tensor]:
    """Output and gradients with everything on one rank; every expert sees every token."""
    w = {name: value.clone().requires_grad_() for name, value in weights_of(stage).items()}
    hidden = draw(50 + stage, BATCH, LENGTH, H).requires_grad_()
    scores = (hidden @ w["router"].T).softmax(-1)
    best = scores.topk(K)
    share = best.values / best.values.sum(-1, keepdim=True)
    table = torch.zeros_like(scores).scatter(-1, best.indices, share)
    if factor is not None:
        room = math.ceil(round(factor * LENGTH * K / E, 9))
        kept = torch.zeros_like(table, dtype=torch.bool)
        for b in range(BATCH):
            for e in range(E):
                asked = [t for t in range(LENGTH) if table[b, t, e] > 0]
                for t in sorted(asked, key=lambda t: -table[b, t, e].item())[:room]:
                    kept[b, t, e] = True
        assert not kept[table > 0].all()
        table = table * kept
    results = torch.stack([expert(hidden, w["up"][e], w["gate"][e], w["down"][e]) for e in range(E)], dim=-1)
    out = (results * table.unsqueeze(2)).sum(-1)
    shared = expert(hidden, w["s_up"], w["s_gate"], w["s_down"]) * (hidden @ w["s_token"].T).sigmoid()
    out = out + shared
    (out * draw(60 + stage, BATCH, LENGTH, H)).sum().backward()
    return {"out": out.detach(), "hidden": hidden.grad} | {name: value.grad for name, value in w.items()}


class Threads:
    """In-process groups of a folding, by axes and rank."""

    def __init__(self, f: Folding) -> None:
        self.f = f
        self.made: dict[str, dict[int, object]] = {}
        for axes in ("ep", "etp", "tp-cp"):
            pairs = {}
            for ranks in f.groups(axes):
                pairs |= dict(zip(ranks, LocalWorld(len(ranks)).groups()))
            self.made[axes] = pairs

    def of(self, rank: int) -> dict[str, object]:
        return {axes: pairs[rank] for axes, pairs in self.made.items()}


def on_rank(
    rank: int, f: Folding, groups: dict, name: str, chunks: int, factor: float | None, backward: bool = True
) -> dict:
    at = f.coordinates(rank)
    stage, w = at["pp"], weights_of(at["pp"])
    dropping = {} if factor is None else {"capacity_factor": factor, "drop_over": "sequence"}
    block = f.ep * f.etp
    layer = MoELayer(
        H,
        F,
        E,
        K,
        ep_group=groups["ep"],
        etp_group=groups["etp"],
        sequence_group=groups["tp-cp"],
        dispatcher=name,
        ranks_per_node=block // 2 if name in ("hierarchical", "auto") and f.ep % 2 == 0 else None,
        shared_ffn_size=F,
        shared_gate=True,
        chunks=chunks,
        router={"dtype": torch.float64, **dropping},
        dtype=torch.float64,
    ).double()
    local = slice(at["ep"] * (E // f.ep), (at["ep"] + 1) * (E // f.ep))
    layer.router.weight.data = w["router"].clone()
    layer.experts.load(w["up"][local], w["down"][local], w["gate"][local])
    layer.shared.expert.load(w["s_up"][None], w["s_down"][None], w["s_gate"][None])
    layer.shared.token_gate.weight.data = w["s_token"].clone()
    rows = slice(at["dp"] * (BATCH // f.dp), (at["dp"] + 1) * (BATCH // f.dp))
    parts = f.tp * f.cp
    part = at["cp"] * f.tp + at["tp"]
    columns = slice(part * LENGTH // parts, (part + 1) * LENGTH // parts)
    hidden = draw(50 + stage, BATCH, LENGTH, H)[rows, columns].clone().requires_grad_(backward)
    if not backward:
        with torch.no_grad():
            return {"at": at, "rows": rows, "columns": columns, "out": layer(hidden)}
    out = layer(hidden)
    (out * draw(60 + stage, BATCH, LENGTH, H)[rows, columns]).sum().backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return {"at": at, "rows": rows, "columns": columns, "out": out.detach(), "hidden": hidden.grad, "grads": grads}


def compare(f: Folding, results: list[dict], factor: float | None) -> None:
    for stage in range(f.pp):
        expected = dense(stage, factor)
        mine = [r for r in results if r["at"]["pp"] == stage]
        total = {name: torch.zeros_like(value) for name, value in expected.items()}
        for r in mine:
            place = (r["rows"], r["columns"])
            assert torch.allclose(r["out"], expected["out"][place], atol=1e-10), "out"
            if "grads" not in r:
                continue
            assert torch.allclose(r["hidden"], expected["hidden"][place], atol=1e-10), "hidden"
            grads, at = r["grads"], r["at"]
            local = slice(at["ep"] * (E // f.ep), (at["ep"] + 1) * (E // f.ep))
            wide = slice(at["etp"] * (F // f.etp), (at["etp"] + 1) * (F // f.etp))
            total["router"] += grads["router.weight"]
            total["up"][local, :, wide] += grads["experts.up"]
            total["gate"][local, :, wide] += grads["experts.gate"]
            total["down"][local, wide] += grads["experts.down"]
            total["s_up"] += grads["shared.expert.up"][0]
            total["s_gate"] += grads["shared.expert.gate"][0]
            total["s_down"] += grads["shared.expert.down"][0]
            total["s_token"] += grads["shared.token_gate.weight"]
        for name in weights_of(0) if "grads" in mine[0] else ():
            assert torch.allclose(total[name], expected[name], atol=1e-9), name


def layouts(worlds: tuple[int, ...], chunks_up_to: int) -> list[tuple[Folding, str, int]]:
    """All foldings of some worlds; dispatchers take turns, and chunks where a turn comes round."""
    found = [f for world in worlds for f in Folding.enumerate(world=world, num_experts=E, layers=8)]
    return [(f, NAMES[i % len(NAMES)], 1 + (i // len(NAMES)) % chunks_up_to) for i, f in enumerate(found)]


def label(case: tuple) -> str:
    f, name, chunks = case
    return f"{f.world}:tp{f.tp}cp{f.cp}pp{f.pp}ep{f.ep}etp{f.etp}-{name}-{chunks}"


def in_threads(case: tuple[Folding, str, int], factor: float | None, backward: bool = True) -> None:
    f, name, chunks = case
    groups = Threads(f)
    results = run_local(
        f.world, lambda group: on_rank(group.rank(), f, groups.of(group.rank()), name, chunks, factor, backward)
    )
    compare(f, results, factor)


@pytest.mark.parametrize("case", layouts((2, 4), 2), ids=label)
@pytest.mark.parametrize("factor", [None, 0.6], ids=["dropless", "full_sequence_dropping"])
def test_every_folding_gives_what_one_rank_gives(case: tuple[Folding, str, int], factor: float | None) -> None:
    in_threads(case, factor)


EIGHT = layouts((8,), 1)


@pytest.mark.parametrize("part", range(8))
def test_every_folding_of_eight_ranks_gives_what_one_rank_gives(part: int) -> None:
    for case in EIGHT[part::8]:
        with named(case):
            in_threads(case, None)


def test_dropping_gives_the_same_under_every_mapping_of_eight_ranks() -> None:
    """Each mapping of attention, which cuts sequences, and each of experts, which brings tokens to them, at least once."""
    seen: set[tuple] = set()
    for case in EIGHT:
        f = case[0]
        pair = {("attention", f.tp, f.cp, f.pp), ("experts", f.ep, f.etp, f.pp)}
        if not pair <= seen:
            seen |= pair
            with named(case):
                in_threads(case, 0.6, backward=False)


@contextmanager
def named(case: tuple) -> Iterator[None]:
    """A failure says under which layout."""
    try:
        yield
    except BaseException as error:
        raise AssertionError(f"{label(case)}: {error}") from error


def over_gloo(group, f: Folding, name: str, chunks: int) -> dict:
    made = f.create_groups()
    return on_rank(group.rank(), f, {axes: made[axes] for axes in ("ep", "etp", "tp-cp")}, name, chunks, None)


@pytest.mark.parametrize(
    ("sizes", "name", "chunks"),
    [
        ({"tp": 2, "cp": 2, "ep": 4, "etp": 2}, "dedup", 2),
        ({"tp": 2, "pp": 2, "ep": 4}, "hierarchical", 1),
    ],
)
def test_processes_over_gloo_give_what_one_rank_gives(pool, sizes: dict, name: str, chunks: int) -> None:
    f = Folding(world=8, **sizes)
    compare(f, pool.run(8, over_gloo, f, name, chunks), None)


def ragged_on_rank(group, tokens: list[int], backend: str) -> tuple[Tensor, Tensor]:
    layer = MoELayer(8, 16, 4, 2, ep_group=group, dispatcher="dedup", chunks=3, backend=backend, activation="gelu")
    for p in layer.parameters():
        p.data = torch.linspace(-0.3, 0.3, p.numel()).view_as(p)
    hidden = draw(group.rank(), tokens[group.rank()], 8).float().requires_grad_()
    out = layer(hidden)
    out.square().sum().backward()
    return out.detach(), hidden.grad


@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_fewer_tokens_than_chunks_and_none_at_all(backend: str) -> None:
    tokens = [2, 0, 7]
    # 4 experts do not spread over 3 ranks; 2 ranks hold them
    for pair in ([2, 0], [0, 7], [1, 1]):
        for (out, grad), n in zip(run_local(2, ragged_on_rank, pair, backend), pair):
            assert out.shape == grad.shape == (n, 8) and bool(out.isfinite().all())
    with pytest.raises(ValueError, match="num_experts=4 cannot be spread evenly over 3 ranks"):
        run_local(3, ragged_on_rank, tokens, backend)


def test_losses_reach_the_router_without_being_asked_for_and_are_the_callers_when_asked() -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, 16, 4, 2, router={"aux_loss": 0.5, "z_loss": 0.1})
    x = torch.randn(2, 6, 8)
    layer(x).sum().backward()
    attached = layer.router.weight.grad.clone()
    layer.zero_grad()
    out, routing = layer(x, return_routing=True)
    (out.sum() + routing.loss).backward()
    assert torch.allclose(attached, layer.router.weight.grad, atol=1e-7)
    layer.zero_grad()
    layer(x, return_routing=True)[0].sum().backward()
    assert not torch.allclose(attached, layer.router.weight.grad, atol=1e-4)


def test_padding_goes_nowhere() -> None:
    layer = MoELayer(8, 16, 4, 2)
    x, padding = torch.randn(2, 6, 8), torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 3:] = True
    out = layer(x, padding=padding)
    assert (out[1, 3:] == 0).all() and torch.allclose(out[0], layer(x)[0])


def test_wrong_chunks_are_named() -> None:
    with pytest.raises(ValueError, match="chunks is 0"):
        MoELayer(8, 16, 4, 2, chunks=0)

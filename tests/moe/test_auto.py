"""What "auto" picks, that all ranks pick alike, and that work in flight is what it seems."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe import build_dispatcher
from tests.moe.cases import Block, Case, H, apply_experts
from tokenring.links.costs import Costs
from tokenring.topology import Topology
from tokenring.transport.inprocess import run_local


def chosen_on_rank(group, experts: int, topk: int, options: dict) -> tuple[str, dict]:
    d = build_dispatcher("auto", num_experts=experts, ep_group=group, **options)
    ids = torch.arange(topk).expand(3, -1)
    sent = d.dispatch(torch.ones(3, 64), ids, torch.ones(3, topk))
    assert torch.equal(d.combine(sent.tokens, sent), torch.full((3, 64), float(topk)))
    return d.chosen.name, d.seconds


@pytest.mark.parametrize(
    ("experts", "topk", "options", "name"),
    [
        (64, 2, {}, "dedup"),
        (64, 8, {"ranks_per_node": 4}, "hierarchical"),
        (64, 8, {"topology": Topology.nodes(2, 4, intra=400.0, inter=10.0)}, "hierarchical"),
        (64, 1, {"topology": Topology.nodes(2, 4, intra=1.0, inter=100.0, nic_per="rank")}, "dedup"),
        (16, 8, {"topology": Topology.bus(8, 3.1)}, "dedup"),
        (16, 8, {"topology": Topology.bus(8, 3.1, costs=Costs(merge_gbytes_per_s=10.0))}, "dedup"),
        (16, 8, {"topology": Topology.bus(8, 3.1, costs=Costs(merge_gbytes_per_s=0.2))}, "allgather"),
        (16, 8, {"topology": Topology.bus(8, 300.0, costs=Costs(merge_gbytes_per_s=10.0))}, "allgather"),
    ],
)
def test_the_choice_follows_the_links(experts: int, topk: int, options: dict, name: str) -> None:
    found = run_local(8, chosen_on_rank, experts, topk, options)
    assert {chosen for chosen, _ in found} == {name}
    assert all(seconds == found[0][1] for _, seconds in found)
    assert found[0][1][name] == min(found[0][1].values())


def test_what_copies_cost_counts_beside_the_links() -> None:
    """By hand: 8 experts a rank of 2, k = 2; a token wants the other rank with p = 1 - (8 7) / (16 15)."""
    links = Topology.bus(2, 1.0, costs=Costs(merge_gbytes_per_s=0.5))
    ((_, found), _) = run_local(2, chosen_on_rank, 16, 2, {"topology": links})
    row, p = 1024 * 64 * 4 / 1e9, 1 - 8 * 7 / (16 * 15)
    # there and back over one bus for both ranks; dedup copies what leaves and adds what returns, allgather only adds
    assert found["dedup"] == pytest.approx(4 * p * row + 2 * p * row / 0.5)
    assert found["allgather"] == pytest.approx(4 * row + row / 0.5)


def refused_first(group) -> str:
    d = build_dispatcher("auto", num_experts=4, ep_group=group, ranks_per_node=2)
    k = 2 if group.rank() else 3
    with pytest.raises(ValueError) as caught:
        d.dispatch(torch.ones(2, H), torch.arange(k).expand(2, -1), torch.ones(2, k))
    good = d.dispatch(torch.ones(2, H), torch.arange(2).expand(2, -1), torch.ones(2, 2))
    assert good.tokens_per_expert.sum() >= 0 and d.chosen is not None
    return str(caught.value)


def test_ranks_that_disagree_are_refused_and_may_choose_later() -> None:
    assert all("mean different calls" in said for said in run_local(4, refused_first))


def test_a_topology_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="topology has 4 ranks"):
        build_dispatcher("auto", num_experts=4, topology=Topology.switch(4, 1.0))
    with pytest.raises(ValueError, match="topology= is for dispatcher 'auto'"):
        build_dispatcher("dedup", num_experts=4, topology=Topology.switch(4, 1.0))


def in_flight_on_rank(rank: int, ep_group, etp_group, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Two batches under way at once, waited for in turn; the same one after the other."""
    d = build_dispatcher("dedup", num_experts=case.num_experts, ep_group=ep_group, etp_group=etp_group)
    local = slice(d.first_expert, d.first_expert + d.local_experts)
    results = []
    for together in (True, False):
        hidden, ids, weights, _ = case.inputs(rank)
        hidden = hidden.requires_grad_()
        halves = [(x[::2], x[1::2]) for x in (hidden, ids, weights)]
        outs = []
        if together:
            pending = [d.start_dispatch(*part) for part in zip(*halves)]
            sent = [p.wait() for p in pending]
            back = [
                d.start_combine(apply_experts(s.tokens, s.tokens_per_expert, case.experts()[local]), s) for s in sent
            ]
            outs = [b.wait() for b in back]
            with pytest.raises(ValueError, match="was waited for before"):
                back[0].wait()
        else:
            for part in zip(*halves):
                s = d.dispatch(*part)
                outs.append(d.combine(apply_experts(s.tokens, s.tokens_per_expert, case.experts()[local]), s))
        (outs[0].square().sum() + outs[1].sum()).backward()
        results.append((outs[0].detach(), outs[1].detach(), hidden.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    return results[0]


@pytest.mark.parametrize(("ep", "etp"), [(4, 1), (2, 2)])
def test_batches_in_flight_together_give_the_same_bits(ep: int, etp: int) -> None:
    Block(ep, etp).run(in_flight_on_rank, Case(ep, etp, 8, 3, (5, 0, 8, 3)))


def test_each_stage_passes_gradcheck() -> None:
    d = build_dispatcher("dedup", num_experts=4)
    ids = torch.tensor([[0, 2], [1, -1], [3, 0]])

    def through(hidden: Tensor, weights: Tensor) -> Tensor:
        sent = d.dispatch(hidden, ids, weights)
        return d.combine(sent.tokens.sin(), sent)

    leaves = [torch.randn(3, size, dtype=torch.float64, requires_grad=True) for size in (5, 2)]
    assert torch.autograd.gradcheck(through, leaves)

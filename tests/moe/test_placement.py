"""Placements: loads, replicas, experts used together; and the layer over them against the layer without."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe import MoELayer, Placement, co_activation, place
from moe.placement import replicas, sum_over_replicas
from moe.workloads import WORKLOADS, routing
from tokenring.transport.inprocess import run_local


@given(st.lists(st.integers(0, 50), min_size=4, max_size=12), st.integers(1, 4), st.integers(0, 6))
def test_every_expert_has_a_slot_and_ranks_have_equal_parts(loads: list[int], ranks: int, spare: int) -> None:
    slots = -(-(len(loads) + spare) // ranks) * ranks
    found = place(torch.tensor(loads), ranks=ranks, slots=slots)
    assert len(found.slots) == slots and set(found.slots) == set(range(len(loads)))
    copies = torch.bincount(torch.tensor(found.slots))
    assert torch.equal(copies, replicas(torch.tensor(loads), slots))
    total = torch.tensor(loads).sum()
    assert torch.isclose(found.rank_loads(torch.tensor(loads)).sum(), total.double())


def test_replicas_and_packing_even_a_skewed_load() -> None:
    loads = torch.tensor([900, 500, 300, 200, 100, 50, 25, 25])
    plain = Placement(tuple(range(8)), 4)
    packed, copied = place(loads, ranks=4), place(loads, ranks=4, slots=12)
    assert plain.imbalance(loads) > packed.imbalance(loads) > copied.imbalance(loads)
    assert packed.imbalance(loads) == pytest.approx(925 / 525) and copied.imbalance(loads) < 1.05


def test_experts_used_together_come_to_one_rank_and_tokens_want_fewer_ranks() -> None:
    draw = torch.Generator().manual_seed(0)
    teams = torch.randperm(32, generator=draw).view(8, 4)
    ids = teams[torch.randint(0, 8, (3000,), generator=draw)]
    stray = torch.rand(ids.shape, generator=draw) < 0.1
    ids = torch.where(stray, (ids + 1) % 32, ids)
    together = co_activation(ids, 32)
    loads = together.diagonal()
    blind, seeing = place(loads, ranks=8), place(loads, ranks=8, together=together)
    assert seeing.rows_per_token(ids) < 0.5 * blind.rows_per_token(ids)
    assert seeing.imbalance(loads) < 1.25


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(0, 1))
def test_no_swap_of_two_slots_is_left_that_helps(seed: int, ranks: int, spare: int) -> None:
    """The score from its definition, for every swap of the placement that was found."""
    draw = torch.Generator().manual_seed(seed)
    experts = 2 * ranks
    loads = torch.randint(0, 100, (experts,), generator=draw)
    together = torch.randint(0, 60, (experts, experts), generator=draw)
    together = together + together.T
    found = place(loads, ranks=ranks, slots=experts + spare * ranks, together=together)
    copies = torch.bincount(torch.tensor(found.slots))

    def score(slots: tuple[int, ...]) -> float:
        own = Placement(slots, ranks)
        held = [own.rank_slots(rank) for rank in range(ranks)]
        pairs = [(a, b) for ones in held for i, a in enumerate(ones) for b in ones[i + 1 :] if a != b]
        shared = sum(float(together[a, b]) / float(copies[a] * copies[b]) for a, b in pairs)
        return ranks * float(own.rank_loads(loads).max()) - shared

    size, best = len(found.slots) // ranks, score(found.slots)
    for i in range(len(found.slots)):
        for j in range((i // size + 1) * size, len(found.slots)):
            slots = list(found.slots)
            slots[i], slots[j] = slots[j], slots[i]
            twice = any(len({*part}) < size for part in (slots[k : k + size] for k in range(0, len(slots), size)))
            assert twice or score(tuple(slots)) > best - 1e-6


def test_rows_per_token_are_what_dedup_sends() -> None:
    ids = routing("W0", 20000, 64, 8, 4, seed=3)[0]
    assert Placement(tuple(range(64)), 4).rows_per_token(ids) == pytest.approx(3.659, abs=0.02)


def test_replicas_share_tokens_evenly_and_minus_one_stays() -> None:
    placement = Placement((0, 1, 0, 2, 0, 3), 3)
    slots = placement.to_slots(torch.tensor([[0, 3], [0, -1], [0, 1], [0, 2]]), source=1)
    assert slots.tolist() == [[2, 5], [4, -1], [0, 1], [2, 3]]


class Layers:
    """The same experts with and without a placement; every rank's own tokens."""

    SIZES = (8, 16, 6, 2)

    def on_rank(self, group, placement: Placement | None) -> tuple[Tensor, Tensor, dict]:
        layer = MoELayer(
            *self.SIZES, ep_group=group, placement=placement, dtype=torch.float64, dispatcher="dedup"
        ).double()
        draw = torch.Generator().manual_seed(3)
        layer.router.weight.data = torch.randn(6, 8, generator=draw, dtype=torch.float64)
        whole = [torch.randn(6, *s, generator=draw, dtype=torch.float64) for s in ((8, 16), (16, 8), (8, 16))]
        slots = placement or Placement(tuple(range(6)), group.size())
        mine = list(slots.rank_slots(group.rank()))
        layer.experts.load(*(w[mine] for w in whole))
        x = torch.randn(
            9, 8, generator=torch.Generator().manual_seed(group.rank()), dtype=torch.float64
        ).requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        layer.sum_replica_gradients()
        return out.detach(), x.grad, dict(zip(mine, layer.experts.up.grad))


@pytest.mark.parametrize("slots", [(5, 3, 1, 4, 2, 0), (0, 1, 0, 2, 3, 0, 4, 5)])
def test_the_layer_gives_the_same_under_any_placement(slots: tuple[int, ...]) -> None:
    plain = run_local(2, Layers().on_rank, None)
    moved = run_local(2, Layers().on_rank, Placement(slots, 2))
    expected = plain[0][2] | plain[1][2]
    for (out, grad, _), (other, other_grad, ups) in zip(plain, moved):
        assert torch.allclose(out, other) and torch.allclose(grad, other_grad)
        for expert, value in ups.items():
            assert torch.allclose(value, expected[expert]), expert


def test_a_rank_without_gradients_takes_part_in_the_sum() -> None:
    def sums(group) -> Tensor:
        from tokenring.transport import connect

        weight = torch.nn.Parameter(torch.ones(2, 3))
        if group.rank() == 0:
            weight.grad = torch.full((2, 3), 5.0)
        sum_over_replicas([weight], Placement((0, 1, 2, 0), 2), connect(group))
        return weight.grad

    first, second = run_local(2, sums)
    assert first.tolist() == [[5.0] * 3, [5.0] * 3] and second.tolist() == [[0.0] * 3, [5.0] * 3]


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_what_they_say(name: str) -> None:
    ids = routing(name, 4000, 32, 4, 4, seed=1, step=3)
    again = routing(name, 4000, 32, 4, 4, seed=1, step=3)
    assert all(torch.equal(a, b) for a, b in zip(ids, again))
    counts = torch.bincount(torch.cat(ids).flatten(), minlength=32).double()
    ranks = counts.view(4, 8).sum(1)
    even = ranks.max() / ranks.mean()
    if name in ("W0", "W4"):
        assert even < 1.05
    if name == "W1":
        assert counts.max() / counts.median() > 2.5 and even < 1.05
    if name in ("W2", "W6", "W7"):
        assert int(ranks.argmax()) == {"W2": 0, "W6": 3, "W7": 0}[name] and even > 1.7
    if name == "W3":
        assert counts[0] / counts[-1] > 4
    if name == "W4":
        assert [x.shape[0] for x in ids] == [0, 2000, 3000, 4000]
    if name == "W5":
        assert (counts[24:] == 0).all() and (counts[:24] > 0).all()


def test_wrong_questions_are_named() -> None:
    with pytest.raises(ValueError, match="slots=5 for 4 experts on 2 ranks"):
        place(torch.ones(4), ranks=2, slots=5)
    with pytest.raises(ValueError, match="ranks is 0"):
        place(torch.ones(4), ranks=0)
    with pytest.raises(ValueError, match="together is"):
        place(torch.ones(4), ranks=2, together=torch.ones(3, 3))
    with pytest.raises(ValueError, match="counts of at least 0"):
        place(torch.tensor([1, -1]), ranks=1)
    with pytest.raises(ValueError, match="a placement has 3 slots on 2 ranks"):
        Placement((0, 1, 2), 2)
    with pytest.raises(ValueError, match="placement is for 3 experts"):
        MoELayer(8, 16, 6, 2, placement=Placement((0, 1, 2), 1))
    with pytest.raises(ValueError, match="workload is 'W9'"):
        routing("W9", 1, 2, 1, 1, seed=0)

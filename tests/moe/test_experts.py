"""Experts and the grouped product, against plain products one expert after the other."""

from __future__ import annotations

import pytest
import torch

from moe import Experts, SharedExperts
from moe.grouped import grouped_matmul


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[5, 0, 3, 8], [0, 0, 0, 16], [0, 0, 0, 0]])
def test_the_grouped_product_equals_one_product_a_group_both_ways(dtype: torch.dtype, counts: list[int]) -> None:
    torch.manual_seed(0)
    rows = sum(counts)
    x, w, d = torch.randn(rows, 16), torch.randn(4, 16, 24), torch.randn(rows, 24)
    results = []
    for backend in ("grouped", "loop"):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        out = grouped_matmul(*leaves, torch.tensor(counts), backend=backend)
        (out * d.to(dtype)).sum().backward()
        results.append((out.detach(), *(leaf.grad for leaf in leaves)))
    exact = torch.cat([part @ m for part, m in zip(x.double().split(counts), w.double())])
    assert torch.allclose(results[0][0].double(), exact, atol=1e-4 if dtype == torch.float32 else 0.2)
    for one, two in zip(*results):
        assert torch.allclose(one, two, atol=1e-4 if dtype == torch.float32 else 0.2)


def test_a_plain_sum_goes_backward_through_the_grouped_product() -> None:
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(2, 8, 8, requires_grad=True)
    grouped_matmul(x, w, torch.tensor([1, 3]), backend="grouped").sum().backward()
    assert torch.allclose(x.grad[0], w[0].sum(1)) and torch.allclose(x.grad[1], w[1].sum(1))


def test_what_the_grouped_product_cannot_is_named() -> None:
    with pytest.raises(ValueError, match=r"cannot: it takes .* got torch\.float64"):
        grouped_matmul(torch.ones(2, 8).double(), torch.ones(1, 8, 8).double(), torch.tensor([2]), backend="grouped")
    with pytest.raises(ValueError, match="no whole 16 bytes"):
        grouped_matmul(torch.ones(2, 3), torch.ones(1, 3, 8), torch.tensor([2]), backend="grouped")
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        grouped_matmul(torch.ones(2, 3), torch.ones(1, 3, 8), torch.tensor([2]), backend="cuda")
    with pytest.raises(ValueError, match="give one dtype"):
        grouped_matmul(torch.ones(2, 3), torch.ones(1, 3, 8).double(), torch.tensor([2]))


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "silu"])
@pytest.mark.parametrize("etp", [1, 2, 4])
def test_parts_of_experts_add_up_to_the_whole(activation: str, etp: int) -> None:
    torch.manual_seed(0)
    up, gate, down = (torch.randn(3, *size).double() for size in ((6, 8), (6, 8), (8, 6)))
    x, counts, weights = torch.randn(7, 6).double(), torch.tensor([4, 0, 3]), torch.rand(7).double()
    act = torch.nn.functional.silu if activation in ("swiglu", "silu") else torch.nn.functional.gelu
    expected = []
    for row, e in zip(x, [0, 0, 0, 0, 2, 2, 2]):
        inner = act(row @ gate[e]) * (row @ up[e]) if "glu" in activation else act(row @ up[e])
        expected.append(inner @ down[e])
    expected = torch.stack(expected) * weights.unsqueeze(1)
    total = torch.zeros_like(x)
    for part in range(etp):
        experts = Experts(6, 8, 3, activation=activation, etp=etp, etp_rank=part, dtype=torch.float64)
        experts.load(up, down, gate if "glu" in activation else None)
        total += experts(x, counts, weights).detach()
    assert torch.allclose(total, expected)


def test_shared_experts_are_an_expert_for_all_times_a_gate() -> None:
    shared, plain = SharedExperts(6, 8, gate=True), SharedExperts(6, 8)
    plain.expert.load_state_dict(shared.expert.state_dict())
    x = torch.randn(5, 6)
    assert torch.allclose(shared(x), plain(x) * torch.sigmoid(x @ shared.token_gate.weight.T))


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        Experts(6, 8, 2, activation="tanh")
    with pytest.raises(ValueError, match="ffn_size=8 cannot be cut into etp=3"):
        Experts(6, 8, 2, etp=3)
    with pytest.raises(ValueError, match="for 5 rows and 2 experts"):
        Experts(6, 8, 2)(torch.ones(5, 6), torch.tensor([2, 2]))
    with pytest.raises(ValueError, match="gate is to be given exactly for gated"):
        Experts(6, 8, 2).load(torch.ones(2, 6, 8), torch.ones(2, 8, 6))

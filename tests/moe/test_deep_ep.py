"""The adapters to DeepEP and HybridEP over stand-ins that answer the same calls on CPUs, against dense experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe import build_dispatcher
from tests.moe.cases import Block, Case, apply_experts
from tokenring.transport import connect


class DeepBuffer:
    """The calls of deep_ep.Buffer: a row for each rank that a token wants, with local ids and -1 for others'."""

    def __init__(self, group) -> None:
        self.transport = connect(group)

    def get_dispatch_layout(self, ids: Tensor, num_experts: int):
        local = num_experts // self.transport.world
        owner = torch.where(ids >= 0, ids // local, -1)
        wants = torch.stack([(owner == r).any(1) for r in range(self.transport.world)], dim=1)
        return wants.sum(0), None, torch.bincount(ids.flatten() + 1, minlength=num_experts + 1)[1:], wants, None

    def dispatch(
        self, x: Tensor, handle=None, topk_idx=None, topk_weights=None, is_token_in_rank=None, **layout: Tensor
    ):
        t = self.transport
        if handle is not None:
            wants, _ = handle
            return torch.cat(t.all_to_all([x[wants[:, r]] for r in range(t.world)])), None, None, None, None, None
        local = layout["num_tokens_per_expert"].numel() // t.world
        parts = []
        for r in range(t.world):
            rows = is_token_in_rank[:, r]
            mine = topk_idx[rows] // local == r
            parts.append((x[rows], torch.where(mine, topk_idx[rows] % local, -1), topk_weights[rows] * mine))
        rows, ids, weights = (t.all_to_all([part[i].contiguous() for part in parts]) for i in range(3))
        sizes = [part.shape[0] for part in rows]
        counts = torch.bincount(torch.cat(ids).flatten() + 1, minlength=local + 1)[1:].tolist()
        return torch.cat(rows), torch.cat(ids), torch.cat(weights), counts, (is_token_in_rank, sizes), None

    def combine(self, x: Tensor, handle, topk_weights: Tensor | None = None):
        wants, sizes = handle

        def home(values: Tensor) -> Tensor:
            total = values.new_zeros(wants.shape[0], values.shape[1])
            for r, part in enumerate(self.transport.all_to_all([p.contiguous() for p in values.split(sizes)])):
                total[wants[:, r]] += part
            return total

        return home(x), None if topk_weights is None else home(topk_weights), None


class HybridBuffer:
    """The calls of deep_ep.HybridEPBuffer: rows expert by expert, filled up to `pad_multiple`."""

    def __init__(self, group) -> None:
        self.transport = connect(group)

    def dispatch_with_permute(self, hidden, routing_map=None, probs=None, handle=None, pad_multiple=None, **rest):
        t = self.transport
        chosen = handle[0] if handle is not None else torch.stack(t.all_gather(routing_map, same_shape=True))
        everything = torch.stack(t.all_gather(hidden, same_shape=True))
        weights = torch.stack(t.all_gather(probs, same_shape=True)) if probs is not None else None
        local = chosen.shape[2] // t.world
        tokens, laid, counts = [], [], []
        for e in range(t.rank * local, (t.rank + 1) * local):
            source, row = chosen[:, :, e].nonzero(as_tuple=True)
            fill = -source.numel() % (pad_multiple or 1)
            tokens.append(torch.nn.functional.pad(everything[source, row], (0, 0, 0, fill)))
            counts.append(source.numel() + fill)
            if weights is not None:
                laid.append(torch.nn.functional.pad(weights[source, row, e], (0, fill)))
        laid = torch.cat(laid) if laid else None
        return torch.cat(tokens), laid, None, torch.tensor(counts), (chosen, counts)

    def combine_with_unpermute(self, hidden, handle, probs=None, pad_multiple=None):
        t, (chosen, counts) = self.transport, handle
        total = torch.zeros(*chosen.shape[:2], hidden.shape[1], dtype=hidden.dtype)
        back = torch.zeros(chosen.shape, dtype=torch.float32)
        start, local = 0, chosen.shape[2] // t.world
        for e, count in zip(range(t.rank * local, (t.rank + 1) * local), counts):
            source, row = chosen[:, :, e].nonzero(as_tuple=True)
            total.index_put_((source, row), hidden[start : start + source.numel()], accumulate=True)
            if probs is not None:
                back[source, row, e] = probs[start : start + source.numel()]
            start += count
        out = sum(t.all_to_all(list(total)))
        return out, sum(t.all_to_all(list(back))) if probs is not None else None


def on_rank(rank: int, ep_group, _, case: Case, name: str, options: dict, weighted: bool):
    kind = {"deepep": DeepBuffer, "hybridep": HybridBuffer}[name]
    d = build_dispatcher(name, num_experts=case.num_experts, ep_group=ep_group, buffer=kind(ep_group), **options)
    hidden, ids, weights, d_out = case.inputs(rank)
    hidden, weights = hidden.requires_grad_(), weights.requires_grad_()
    local = case.num_experts // case.ep
    matrices = case.experts()[rank * local : (rank + 1) * local].requires_grad_()
    sent = d.dispatch(hidden, ids, weights)
    out = apply_experts(sent.tokens, sent.tokens_per_expert, matrices)
    if weighted:
        out = out * sent.weights.unsqueeze(1).double()
    result = d.combine(out, sent, weighted=weighted)
    (result * d_out).sum().backward()
    return result.detach(), hidden.grad, weights.grad, matrices.grad


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("name", ["deepep", "hybridep"])
def test_the_adapters_equal_dense_experts(name: str, align: int, weighted: bool) -> None:
    case = Case(3, 1, 12, 4, (5, 0, 8), drop=0.2)
    outs, d_hidden, d_weights, d_experts = case.dense()
    options = {"align": align} | ({"max_tokens": 8} if name == "hybridep" else {})
    results = Block(3, 1).run(on_rank, case, name, options, weighted)
    for rank, (out, dh, dw, _) in enumerate(results):  # weights travel in float32
        assert torch.allclose(out, outs[rank], atol=1e-5)
        assert torch.allclose(dh, d_hidden[rank], atol=1e-5)
        assert torch.allclose(dw.double(), d_weights[rank], atol=1e-5)
    assert torch.allclose(torch.cat([dm for *_, dm in results]), d_experts, atol=1e-5)


def test_what_the_kernels_cannot_is_named() -> None:
    with pytest.raises(ValueError, match="needs the package deep_ep, which cannot be imported"):
        build_dispatcher("deepep", num_experts=4, ep_group=None)
    with pytest.raises(ValueError, match=r"'dedup' knows no \['max_tokens'\]"):
        build_dispatcher("dedup", num_experts=4, max_tokens=3)
    d = build_dispatcher("hybridep", num_experts=4, ep_group=None, max_tokens=2, buffer=object())
    with pytest.raises(ValueError, match="hidden has 3 rows; max_tokens=2"):
        d.dispatch(torch.ones(3, 2), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))


def with_etp(rank: int, ep_group, etp_group) -> None:
    with pytest.raises(ValueError, match="over the EP group alone"):
        build_dispatcher("deepep", num_experts=4, ep_group=ep_group, etp_group=etp_group, buffer=object())


def test_cut_experts_are_refused() -> None:
    Block(1, 2).run(with_etp)

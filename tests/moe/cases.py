"""A batch that differs on every rank, experts that are matrices, and the same computed densely on one rank in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

H = 6


@dataclass
class Case:
    """Rank r of the EP x ETP block (ETP fastest) holds tokens[r] tokens."""

    ep: int
    etp: int
    num_experts: int
    topk: int
    tokens: tuple[int, ...]
    routing: str = "uniform"
    drop: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        assert len(self.tokens) == self.ep * self.etp

    def inputs(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden, ids, weights and the gradient of the output, of one rank."""
        draw = torch.Generator().manual_seed(1000 * self.seed + rank)
        n = self.tokens[rank]
        hidden = torch.randn(n, H, generator=draw, dtype=torch.float64)
        ids = torch.rand(n, self.num_experts, generator=draw).argsort(1)[:, : self.topk]
        if self.routing == "one":
            ids = torch.full((n, self.topk), -1)
            ids[:, :1] = self.num_experts - 1
        elif self.routing == "first_rank":
            ids = torch.arange(self.topk).expand(n, -1).clone()
        ids = ids.masked_fill(torch.rand(ids.shape, generator=draw) < self.drop, -1)
        weights = torch.rand(ids.shape, generator=draw, dtype=torch.float64)
        d_out = torch.randn(n, H, generator=draw, dtype=torch.float64)
        return hidden, ids, weights, d_out

    def experts(self) -> Tensor:
        """(E, H, H): expert e is x -> x W[e]."""
        draw = torch.Generator().manual_seed(7)
        return torch.randn(self.num_experts, H, H, generator=draw, dtype=torch.float64)

    def dense(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """Outputs, gradients of hidden and of weights by rank, and the gradient of the experts."""
        matrices = self.experts().requires_grad_()
        outs, leaves, loss = [], [], 0.0 * matrices.sum()
        for rank in range(self.ep * self.etp):
            hidden, ids, weights, d_out = self.inputs(rank)
            hidden, weights = hidden.requires_grad_(), weights.requires_grad_()
            out = torch.zeros_like(hidden)
            for t in range(ids.shape[0]):
                for j in range(self.topk):
                    if ids[t, j] >= 0:
                        out[t] = out[t] + weights[t, j] * (hidden[t] @ matrices[ids[t, j]])
            outs.append(out.detach())
            leaves.append((hidden, weights))
            loss = loss + (out * d_out).sum()
        loss.backward()
        zeros = [[torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in pair] for pair in leaves]
        return outs, [z[0] for z in zeros], [z[1] for z in zeros], matrices.grad


def apply_experts(tokens: Tensor, per_expert: Tensor, matrices: Tensor) -> Tensor:
    """Expert-major tokens through one matrix each."""
    parts = tokens.split(per_expert.tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices)])


class Block:
    """The in-process groups of an EP x ETP block, one pair for each rank."""

    def __init__(self, ep: int, etp: int) -> None:
        from tokenring.transport.inprocess import LocalWorld

        over_ep = [LocalWorld(ep).groups() for _ in range(etp)]
        over_etp = [LocalWorld(etp).groups() for _ in range(ep)]
        self.pairs = [(over_ep[t][e], over_etp[e][t]) for e in range(ep) for t in range(etp)]

    def run(self, function, *args) -> list:
        """`function(rank, ep_group, etp_group, *args)` on every rank, each a thread; the first real error is raised."""
        from tokenring.transport.inprocess import run_local

        return run_local(len(self.pairs), lambda group: function(group.rank(), *self.pairs[group.rank()], *args))

"""Routing patterns for benchmarks and tests, made from (workload, seed, step) alone.

The names are those of Megatron-Core's public token-imbalance benchmark; how each is drawn is defined here.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORKLOADS = {
    "W0": "balanced: every set of k experts alike",
    "W1": "hot experts: an eighth of the experts, spread over all ranks, four times as likely",
    "W2": "hot rank: the experts of one rank four times as likely",
    "W3": "spread heat: likelihoods fall from expert to expert down to an eighth",
    "W4": "ragged sources: rank r holds (r + 1) / world of the tokens, the first rank none",
    "W5": "idle experts: a quarter of the experts, whole ranks of them, get nothing",
    "W6": "rotating hot spot: the hot rank moves on each step",
    "W7": "burst: every fourth step all tokens want the experts of one rank first",
}


def routing(
    workload: str, tokens: int, num_experts: int, topk: int, world: int, *, seed: int, step: int = 0
) -> list[Tensor]:
    """Expert ids (T, k) of every rank.

    Args:
        workload: "W0" to "W7".
        tokens: T of a rank (the largest with W4).
        num_experts, topk, world: E, k and ranks; equal parts of the experts belong to each rank.

    >>> [ids.shape[0] for ids in routing("W4", 8, 4, 2, 4, seed=0)]
    [0, 4, 6, 8]
    """
    if workload not in WORKLOADS:
        raise ValueError(f"workload is {workload!r}; give one of {', '.join(WORKLOADS)}")
    likely = _likelihoods(workload, num_experts, topk, world, step)
    ids = []
    for rank in range(world):
        draw = torch.Generator().manual_seed(((seed * 1000 + step) * 8 + list(WORKLOADS).index(workload)) * 1000 + rank)
        n = tokens if workload != "W4" else (tokens * (rank + 1) // world if rank else 0)
        # the k largest of log p + Gumbel noise are k draws without replacement
        noise = -torch.log(-torch.log(torch.rand(n, num_experts, generator=draw, dtype=torch.float64)))
        ids.append((likely.log() + noise).topk(topk, dim=1).indices if n else torch.empty(0, topk, dtype=torch.int64))
    return ids


def _likelihoods(workload: str, num_experts: int, topk: int, world: int, step: int) -> Tensor:
    likely = torch.ones(num_experts, dtype=torch.float64)
    local = num_experts // world
    if workload == "W1":
        likely[:: max(1, num_experts // max(1, num_experts // 8))] = 4
    elif workload in ("W2", "W6"):
        hot = step % world if workload == "W6" else 0
        likely[hot * local : (hot + 1) * local] = 4
    elif workload == "W3":
        likely = torch.logspace(0, -3, num_experts, base=2, dtype=torch.float64)
    elif workload == "W5":
        idle = min(num_experts // 4, num_experts - topk)
        likely[num_experts - idle :] = 1e-30
    elif workload == "W7" and step % 4 == 3:
        likely[:local] = 1e6
    return likely

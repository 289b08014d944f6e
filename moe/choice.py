"""Which experts a token goes to: scores, groups, top-k, weights.

    s = softmax(logits), sigmoid(logits) or sqrt(softplus(logits))      over E experts
    ids = top-k of s + bias, inside the best groups if there are groups
    weights = scale * s[ids] / sum s[ids]                               (without the sum if normalize is off)

The bias only chooses; the weights never see it (auxiliary-loss-free balancing, arXiv 2408.15664, section 3). A group's score is
the sum of its best k / group_topk biased scores (DeepSeek-V3, arXiv 2412.19437, section 2.1.2, with two of 256 experts).
"""

from __future__ import annotations

import torch
from torch import Tensor

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")


def score(logits: Tensor, kind: str) -> Tensor:
    """Scores of (T, E) logits in their dtype."""
    if kind == "softmax":
        return logits.softmax(dim=-1)
    if kind == "sigmoid":
        return logits.sigmoid()
    if kind == "sqrtsoftplus":
        return torch.nn.functional.softplus(logits).sqrt()
    raise ValueError(f"score is {kind!r}; give one of {', '.join(SCORES)}")


def choose(
    scores: Tensor,
    topk: int,
    *,
    bias: Tensor | None = None,
    num_groups: int = 1,
    group_topk: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(ids, weights), both (T, k), best first; a tie goes to the lowest expert.

    >>> choose(torch.tensor([[0.1, 0.6, 0.3]]), 2)[0]
    tensor([[1, 2]])
    """
    wanted = scores.detach() if bias is None else scores.detach() + bias
    if num_groups > 1:
        wanted = wanted.masked_fill(~best_groups(wanted, topk, num_groups, group_topk), -torch.inf)
    # top-k leaves the order of equal scores open; a stable sort does not
    ids = wanted.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    weights = scores.gather(1, ids)
    if normalize and topk > 1:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    return ids, weights * scale


def best_groups(scores: Tensor, topk: int, num_groups: int, group_topk: int) -> Tensor:
    """Mask (T, E) of the experts that belong to the best `group_topk` groups."""
    grouped = scores.view(scores.shape[0], num_groups, -1)
    counted = max(1, min(topk // group_topk, grouped.shape[-1]))
    totals = grouped.topk(counted, dim=-1).values.sum(dim=-1)
    best = totals.sort(dim=-1, descending=True, stable=True).indices[:, :group_topk]
    chosen = torch.zeros_like(totals, dtype=torch.bool).scatter(1, best, True)
    return chosen.unsqueeze(-1).expand_as(grouped).reshape(scores.shape)


def forced(
    tokens: int,
    num_experts: int,
    topk: int,
    kind: str,
    generator: torch.Generator | None,
    device: torch.device | None = None,
) -> Tensor:
    """(T, k) expert ids that ignore the data: "random" draws k of E evenly, "even" loads all experts alike.

    >>> forced(3, 6, 2, "even", None).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    if kind == "random":
        return torch.rand(tokens, num_experts, generator=generator, device=device).argsort(dim=-1)[:, :topk]
    first = torch.arange(tokens, device=device).unsqueeze(1)
    return (first + torch.arange(topk, device=device) * num_experts // topk) % num_experts

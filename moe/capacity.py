"""Dropping: an expert takes at most C = ceil(CF n k / E) of n tokens.

    sub-sequence    n counts the tokens of this rank, which drops by what it sees; the result depends on the cut
    full sequence   n counts the tokens of a whole sequence; the ranks that hold it gather what they ask for and drop
                    alike, so the result is the same under every cut

(MoE Parallel Folding, arXiv 2504.14960, section 3.3.) The best stay, or the first; equals stay in order of position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenring.transport import Transport

DROPS = ("probability", "position")


def expert_capacity(factor: float, tokens: int, topk: int, num_experts: int) -> int:
    """Tokens that an expert takes of `tokens`.

    >>> expert_capacity(1.0, 100, 2, 8)
    25
    """
    # CF n k / E in binary may end a little above the whole number it is meant to be
    return math.ceil(round(factor * tokens * topk / num_experts, 9))


def keep_local(ids: Tensor, weights: Tensor, factor: float, num_experts: int, drop_by: str) -> Tensor:
    """Mask (T, k) of what stays, judged by this rank's tokens alone; entries with id -1 never stay.

    >>> keep_local(torch.tensor([[0], [0], [1]]), torch.tensor([[0.2], [0.9], [0.5]]), 0.5, 2, "probability").tolist()
    [[False], [True], [True]]
    """
    tokens = int((ids >= 0).any(dim=1).sum()) if ids.numel() else 0
    room = expert_capacity(factor, tokens, ids.shape[1], num_experts)
    capacity = torch.full((1, num_experts), room, device=ids.device)
    position = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1).expand_as(ids)
    return _keep(ids, weights, position, torch.zeros_like(position), capacity, drop_by)


def keep_sequence(
    ids: Tensor,
    weights: Tensor,
    factor: float,
    num_experts: int,
    drop_by: str,
    transport: Transport,
    positions: Tensor | None,
    sequences: Tensor,
) -> Tensor:
    """Mask (T, k) of what stays, judged by all tokens of each sequence over the ranks of `transport`. Collective.

    Args:
        positions: (T,) int64, where each token stands in its sequence; None: ranks hold consecutive parts, in rank order.
        sequences: (T,) int64 >= 0, the sequence each token belongs to; the same number on every rank means the same one.
    """
    own = positions if positions is not None else torch.arange(ids.shape[0], device=ids.device)
    columns = torch.stack([own, sequences, (ids >= 0).any(dim=1).long()], dim=1)
    parts = transport.all_gather(torch.cat([columns, ids], dim=1), control=True)
    all_weights = torch.cat(transport.all_gather(weights.detach().contiguous(), control=True))
    starts = torch.tensor([0] + [part.shape[0] for part in parts]).cumsum(0).tolist()
    if positions is None:
        for part, start in zip(parts, starts):
            part[:, 0] += start
    everyone = torch.cat(parts)
    position, sequence, live, all_ids = everyone[:, 0], everyone[:, 1], everyone[:, 2], everyone[:, 3:]
    lengths = torch.bincount(sequence, weights=live.double(), minlength=1).tolist()
    room = [[expert_capacity(factor, int(n), ids.shape[1], num_experts)] * num_experts for n in lengths]
    spread = (position.unsqueeze(1).expand_as(all_ids), sequence.unsqueeze(1).expand_as(all_ids))
    kept = _keep(all_ids, all_weights, *spread, torch.tensor(room, device=ids.device), drop_by)
    return kept[starts[transport.rank] : starts[transport.rank + 1]]


def _keep(ids: Tensor, weights: Tensor, position: Tensor, sequence: Tensor, capacity: Tensor, drop_by: str) -> Tensor:
    """The first entries of each (sequence, expert) up to its capacity, by falling weight or by rising position."""
    experts = capacity.shape[1]
    order = position.reshape(-1).argsort(stable=True)
    if drop_by == "probability":
        order = order[weights.detach().reshape(-1)[order].argsort(descending=True, stable=True)]
    owner = torch.where(ids >= 0, sequence * experts + ids, capacity.numel()).reshape(-1)
    order = order[owner[order].argsort(stable=True)]
    sorted_owner = owner[order]
    first = torch.searchsorted(sorted_owner, sorted_owner)
    room = torch.cat([capacity.reshape(-1), capacity.new_zeros(1)])[sorted_owner]
    kept = torch.empty_like(owner, dtype=torch.bool)
    kept[order] = torch.arange(owner.numel(), device=ids.device) - first < room
    return kept.view_as(ids)

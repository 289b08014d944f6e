"""Losses that spread tokens over experts, and the bias that does it without a loss.

    P_e = mean score of expert e over n tokens     f_e = its share of the n k choices     (before any dropping)
    aux       c E sum_e f_e P_e                    n: the tokens of the micro-batch on all ranks of the group
    sequence  the same, sequence by sequence, averaged over sequences
    global    the same with f_e averaged over all micro-batches since the last reset, on all ranks of the global group
    z         c mean logsumexp(logits)^2

(Switch Transformers, arXiv 2101.03961, section 2.2; ST-MoE, arXiv 2202.08906, section 2.2; arXiv 2501.11873 for the global
one.) What a rank gets is its *share*: the shares of a group add up to the loss, and so do the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenring.transport import Transport


def sum_over(transport: Transport, x: Tensor) -> Tensor:
    """Sum of equally shaped tensors over the ranks, in rank order, so that every rank gets the same bits. No gradient."""
    return torch.stack(transport.all_gather(x.contiguous(), same_shape=True, control=True)).sum(dim=0)


def normalised(scores: Tensor) -> Tensor:
    """Scores of (T, E) that add up to one for each token."""
    return scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)


def count_choices(ids: Tensor, num_experts: int) -> Tensor:
    """(E,) int64: how many of the (T, k) choices fell on each expert; -1 is none.

    >>> count_choices(torch.tensor([[0, 2], [2, -1]]), 3)
    tensor([1, 0, 2])
    """
    return torch.bincount(ids.reshape(-1) + 1, minlength=num_experts + 1)[1:]


def aux_loss(scores: Tensor, counts: Tensor, tokens: float) -> Tensor:
    """This rank's share of E sum f P.

    Args:
        scores: (T, E) normalised scores of this rank's tokens.
        counts: (E,) choices of all ranks.
        tokens: on all ranks.
    """
    share = counts.to(scores.dtype) / counts.sum().clamp_min(1)
    return counts.shape[0] * (scores.sum(dim=0) * share).sum() / max(tokens, 1)


def sequence_loss(scores: Tensor, ids: Tensor, sequences: Tensor, transport: Transport) -> Tensor:
    """This rank's share of the mean over sequences of E sum f P. Collective.

    Args:
        scores: (T, E) normalised scores; ids: (T, k); sequences: (T,) int64 >= 0, numbered alike on every rank.
    """
    experts = scores.shape[1]
    highest = sequences.max().view(1) if sequences.numel() else sequences.new_full((1,), -1)
    rows = max(1, 1 + max(int(x) for x in transport.all_gather(highest, same_shape=True, control=True)))
    owner = torch.where(ids >= 0, sequences.unsqueeze(1) * experts + ids, -1).reshape(-1)
    counts = torch.bincount(owner + 1, minlength=rows * experts + 1)[1:].view(rows, experts)
    lengths = torch.bincount(sequences, minlength=rows).unsqueeze(1)
    both = sum_over(transport, torch.cat([counts, lengths], dim=1)).to(scores.dtype)
    counts, lengths = both[:, :experts], both[:, experts]
    share = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    weight = share / lengths.clamp_min(1).unsqueeze(1) / (lengths > 0).sum().clamp_min(1)
    return experts * (scores * weight[sequences]).sum()


def z_loss(logits: Tensor, tokens: float) -> Tensor:
    """This rank's share of the mean squared logsumexp of (T, E) logits; `tokens`: on all ranks."""
    return logits.logsumexp(dim=-1).square().sum() / max(tokens, 1)


class AttachLoss(torch.autograd.Function):
    """Identity on weights whose backward also differentiates a loss, as if it had been added to the model's."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)

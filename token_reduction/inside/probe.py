"""What attention did, asked for afterwards: from queries, keys and log-sum-exps, in blocks, with no attention map.

    A_ij = exp(scale q_i . k_j - lse_i)            any back end gives lse: FlashAttention, SDPA, sparse, ring

    received(rows)   mean over heads and query rows of A[:, j]           for each key j of this rank
    share(rows, c)   mean over heads and rows of sum_{j in c} A_ij
    row(i)           A[i, :], mean over heads

On several ranks each holds its own query and key rows. The chosen query rows travel once (few, for most scorers), every rank
answers for its own keys; a share adds one number per row over ranks. Nothing of the size of an attention map exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tokenring.transport import SingleRank, Transport

_BLOCK_ENTRIES = 2**22


@dataclass(frozen=True, eq=False)
class Probe:
    """One layer's attention of one sequence.

    Args:
        q: (Sq, H, D) this rank's query rows, rotated. k: (Sk, Hk, D) its key rows, rotated; H is a multiple of Hk.
        lse: (H, Sq) natural log of the sum over all keys of exp(scale q . k) that the back end reported.
        q_order, k_order: (Sq,), (Sk,) int64 global row numbers; a key is seen by queries of the same or a larger number.
        scale: of the logits; None: D^-1/2.
        causal: False lets every query see every key.
        transport: of the ranks; one rank alone unless given.

    >>> q = torch.zeros(3, 1, 2); k = torch.zeros(3, 1, 2)
    >>> lse = torch.tensor([[1.0, 2.0, 3.0]]).log()
    >>> Probe(q, k, lse, torch.arange(3), torch.arange(3)).row(2)
    tensor([0.3333, 0.3333, 0.3333])
    """

    q: Tensor
    k: Tensor
    lse: Tensor
    q_order: Tensor
    k_order: Tensor
    scale: float | None = None
    causal: bool = True
    transport: Transport | None = None

    def __post_init__(self) -> None:
        (rows, heads, width), (keys, key_heads, key_width) = self.q.shape, self.k.shape
        if heads % key_heads or width != key_width:
            raise ValueError(
                f"q {tuple(self.q.shape)} and k {tuple(self.k.shape)}: (rows, heads, D), H a multiple of Hk"
            )
        if self.lse.shape != (heads, rows) or self.q_order.shape != (rows,) or self.k_order.shape != (keys,):
            raise ValueError(
                f"lse is (H, Sq) = ({heads}, {rows}), orders ({rows},) and ({keys},); got {tuple(self.lse.shape)}, "
                f"{tuple(self.q_order.shape)}, {tuple(self.k_order.shape)}"
            )

    @classmethod
    def of(cls, q: Tensor, k: Tensor, order: Tensor, scale: float | None = None) -> Probe:
        """The causal probe of queries and keys of the same rows on one rank, where no back end has given the lse: it is made
        here, in blocks. q (S, H, D), k (S, Hk, D), order (S,)."""
        probe = cls(q, k, q.new_zeros(q.shape[1], len(q)), order, order, scale)
        factor, step = scale or q.shape[-1] ** -0.5, max(1, _BLOCK_ENTRIES // max(1, q.shape[1] * len(k)))
        cuts = [slice(first, first + step) for first in range(0, len(q), step)]
        parts = [probe._logits(q[cut], order[cut], factor).logsumexp(-1) for cut in cuts]
        lse = torch.cat(parts, 1) if parts else probe.lse
        return cls(q, k, lse, order, order, scale)

    @cached_property
    def _wire(self) -> Transport:
        return self.transport or SingleRank()

    @cached_property
    def keys(self) -> Tensor:
        """(Sk, H, D) keys, each head of a group the same."""
        return self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)

    def _asked(self, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query rows (R, H, D), lse (H, R) and order (R,) of global rows, from whatever rank; None: all, ascending."""
        mine = torch.ones_like(self.q_order, dtype=torch.bool) if rows is None else torch.isin(self.q_order, rows)
        q, lse, order = (
            torch.cat(self._wire.all_gather(part.contiguous()))
            for part in (self.q[mine], self.lse[:, mine].mT, self.q_order[mine])
        )
        place = order.argsort()
        return q[place], lse[place].mT, order[place]

    def _blocks(self, rows: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """A of asked rows and this rank's keys: (H, r, Sk) with the rows' order, block by block."""
        q, lse, order = self._asked(rows)
        scale = self.scale or q.shape[-1] ** -0.5
        step = max(1, _BLOCK_ENTRIES // max(1, q.shape[1] * len(self.k)))
        for first in range(0, len(q), step):
            part = slice(first, first + step)
            weight = torch.exp(torch.einsum("rhd,khd->hrk", q[part], self.keys) * scale - lse[:, part, None])
            yield self._seen(weight, order[part]), order[part]

    def _seen(self, weight: Tensor, order: Tensor) -> Tensor:
        return weight.masked_fill_(self.k_order > order[:, None], 0.0) if self.causal else weight

    def received(self, rows: Tensor | None = None) -> Tensor:
        """(Sk,) attention that each key of this rank receives, mean over heads and the global query rows `rows` (all)."""
        total, count = self.lse.new_zeros(len(self.k)), 0
        for weight, order in self._blocks(rows):
            total += weight.mean(0).sum(0)
            count += len(order)
        return total / max(1, count)

    def row(self, row: int) -> Tensor:
        """(Sk,) attention of one global query row, mean over heads."""
        return self.received(torch.tensor([row], device=self.q.device))

    def shares(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(H, R) share of each head's and row's attention that falls on the keys `columns` (Sk,) bool of every rank."""
        parts = [weight[..., columns].sum(-1) for weight, _ in self._blocks(rows)]
        own = torch.cat(parts, 1) if parts else self.lse.new_zeros(self.lse.shape[0], 0)
        return torch.stack(self._wire.all_gather(own, same_shape=True)).sum(0)

    def share(self, rows: Tensor, columns: Tensor) -> float:
        """Mean over heads and rows of `shares`."""
        return float(self.shares(rows, columns).detach().mean())

    def pagerank(self, steps: int = 5, temperature: float = 0.1) -> Tensor:
        """(Sk,) importance by power iteration, d <- d M from d = 1/S, M = softmax(logits / temperature); AIM's score:
        sqrt(mean over heads of d^2). Every rank gets its own keys' importance; query and key rows must be the same rows.
        """
        q, _, order = self._asked(None)
        scale = (self.scale or q.shape[-1] ** -0.5) / temperature
        heads, n = q.shape[1], len(q)
        step = max(1, _BLOCK_ENTRIES // max(1, heads * len(self.k)))
        cuts = [slice(first, first + step) for first in range(0, n, step)]
        norm = torch.cat([self._logits(q[c], order[c], scale).logsumexp(-1) for c in cuts], 1)
        norm = torch.stack(self._wire.all_gather(norm, same_shape=True)).logsumexp(0)
        where = torch.searchsorted(order, self.k_order)
        everyone = q.new_full((heads, n), 1.0 / n)
        for _ in range(steps):
            fresh = q.new_zeros(heads, len(self.k))
            for c in cuts:
                m = torch.exp(self._logits(q[c], order[c], scale) - norm[:, c, None])
                fresh += torch.einsum("hr,hrk->hk", everyone[:, c], m)
            places = torch.cat(self._wire.all_gather(where))
            everyone = torch.cat(self._wire.all_gather(fresh.mT.contiguous()))[places.argsort()].mT
        return fresh.square().mean(0).sqrt()

    def _logits(self, q: Tensor, order: Tensor, scale: float) -> Tensor:
        logits = torch.einsum("rhd,khd->hrk", q, self.keys) * scale
        return logits.masked_fill_(self.k_order > order[:, None], -torch.inf) if self.causal else logits

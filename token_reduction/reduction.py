"""The result of every method: a sparse matrix W from tokens to kept rows, with an anchor token for each row.

    reduced = W @ plane,   W (K, N) given as (row, source, weight),   anchor index (K,)

Pruning is a W of one-hot rows, merging a W of weighted rows; both are the same object and apply to every plane that has one
entry per token. What cannot be averaged follows the anchor: a row sits where its anchor token sat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from token_reduction.tokens import TokenShard


@dataclass(frozen=True, eq=False)
class Reduction:
    """Which rows stay, of what they are made, and where they sit.

    All row numbers are local to the tokens that were reduced (one rank's rows in `reduce_distributed`).

    Attributes:
        index: (K,) int64, anchor token of each kept row; ascending inside an item.
        cu_seqlens: (items + 1,) int64 on the CPU, offsets of the items in the kept rows.
        row, source, weight: (M,) the entries of W, ordered by row, then source; int64, int64, float64.
        sizes: (K,) int64, how many tokens fell in each kept row: 1 where a method only prunes.
        sources: N, the number of tokens that went in.
        scores: (N,) float32, what the method thought of each token, or None where it has no opinion.
        global_index: (K,) int64, the anchors' rows in the whole batch; equal to `index` on a single rank.

    >>> r = Reduction.prune(torch.tensor([0, 3]), torch.tensor([0, 2]), sources=4)
    >>> r.apply(torch.tensor([10.0, 11.0, 12.0, 13.0]))
    tensor([10., 13.])
    """

    index: Tensor
    cu_seqlens: Tensor
    row: Tensor
    source: Tensor
    weight: Tensor
    sizes: Tensor
    sources: int
    scores: Tensor | None
    global_index: Tensor

    @classmethod
    def prune(
        cls,
        index: Tensor,
        cu_seqlens: Tensor,
        sources: int,
        scores: Tensor | None = None,
        global_index: Tensor | None = None,
    ) -> Reduction:
        """One-hot rows: keep the tokens `index` as they are."""
        ones = torch.ones(index.numel(), dtype=torch.float64, device=index.device)
        rows = torch.arange(index.numel(), device=index.device)
        where = index if global_index is None else global_index
        return cls(index, cu_seqlens, rows, index, ones, torch.ones_like(index), sources, scores, where)

    @classmethod
    def keep(cls, shard: TokenShard, kept: Sequence[Tensor], scores: Tensor | None = None) -> Reduction:
        """This rank's part of a pruning: `kept` holds, for each item, the ascending global rows that stay anywhere."""
        local = [shard.find(rows.to(shard.global_index.device)) for rows in kept]
        local = [rows[rows >= 0] for rows in local]
        offsets = torch.tensor([0, *(rows.numel() for rows in local)]).cumsum(0)
        index = torch.cat(local)
        return cls.prune(index, offsets, shard.x.shape[0], scores, shard.global_index[index])

    @property
    def one_hot(self) -> bool:
        """Whether every kept row is exactly its anchor token."""
        return self.source.numel() == self.index.numel() and bool((self.weight == 1).all())

    def apply(self, plane: Tensor) -> Tensor:
        """Reduce any plane (N, ...) to (K, ...), in its own dtype and on its own device.

        Pruning copies the kept entries of any dtype. A merging W averages floating planes (in float32, float64 for
        float64) and gives integer and boolean planes the value of the anchor: they are labels, and a mean of labels is none.
        """
        if plane.dim() < 1 or plane.shape[0] != self.sources:
            raise ValueError(
                f"a plane has one entry for each of the {self.sources} tokens in dim 0, got shape {tuple(plane.shape)}; "
                "positions (axes, tokens) go through apply_positions"
            )
        if not plane.is_floating_point() or self.one_hot:
            return plane[self.index.to(plane.device)]
        wide = torch.float64 if plane.dtype == torch.float64 else torch.float32
        source, row = self.source.to(plane.device), self.row.to(plane.device)
        weight = self.weight.to(plane.device, wide).view(-1, *([1] * (plane.dim() - 1)))
        out = torch.zeros((self.index.numel(), *plane.shape[1:]), dtype=wide, device=plane.device)
        return out.index_add_(0, row, plane[source].to(wide) * weight).to(plane.dtype)

    def apply_positions(self, positions: Tensor) -> Tensor:
        """Positions (P, N) of the kept rows, (P, K): each row takes its anchor's, nothing is renumbered."""
        if positions.dim() != 2 or positions.shape[1] != self.sources:
            raise ValueError(f"positions are (axes, {self.sources} tokens), got shape {tuple(positions.shape)}")
        return positions[:, self.index.to(positions.device)]

    def dense(self) -> Tensor:
        """W as a (K, N) float64 matrix, for looking at and for tests."""
        matrix = torch.zeros(self.index.numel(), self.sources, dtype=torch.float64, device=self.index.device)
        return matrix.index_put_((self.row, self.source), self.weight, accumulate=True)

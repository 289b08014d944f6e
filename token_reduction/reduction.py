"""The result of every method: a sparse matrix W from tokens to kept rows, with an anchor token for each row.

    reduced = W @ plane,   W (K, N) given as (row, source, weight),   anchor index (K,)

Pruning is a W of one-hot rows, merging a W of weighted rows; both are the same object and apply to every plane that has one
entry per token. What cannot be averaged follows the anchor: a row sits where its anchor token sat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from token_reduction.borrow import Borrow
from token_reduction.tokens import TokenShard


@dataclass(frozen=True, eq=False)
class Reduction:
    """Which rows stay, of what they are made, and where they sit.

    All row numbers are local to the tokens that were reduced (one rank's rows in `reduce_distributed`).

    Attributes:
        index: (K,) int64, anchor token of each kept row; ascending inside an item.
        cu_seqlens: (items + 1,) int64 on the CPU, offsets of the items in the kept rows.
        row, source, weight: (M,) the entries of W, ordered by row, then source; int64, int64, float64. A source of
            `sources` or more is a borrowed row.
        sizes: (K,) int64, how many tokens fell in each kept row: 1 where a method only prunes.
        sources: N, the number of tokens that went in.
        scores: (N,) float32, what the method thought of each token, or None where it has no opinion.
        global_index: (K,) int64, the anchors' rows in the whole batch; equal to `index` on a single rank.
        borrow: rows of other ranks that merges here draw on, or None; with it `apply` is collective.

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
    borrow: Borrow | None = None

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
        return self.source.numel() == self.index.numel() and bool(
            (self.weight == 1).all() and (self.source == self.index).all()
        )

    def apply(self, plane: Tensor) -> Tensor:
        """Reduce any plane (N, ...) to (K, ...), in its own dtype and on its own device.

        Pruning copies the kept entries of any dtype. A merging W averages floating planes (in float32, float64 for
        float64) and gives integer and boolean planes the value of the anchor: they are labels, and a mean of labels is none.
        Where a merge draws on rows of other ranks (`borrow`), every rank calls this alike.
        """
        if plane.dim() < 1 or plane.shape[0] != self.sources:
            raise ValueError(
                f"a plane has one entry for each of the {self.sources} tokens in dim 0, got shape {tuple(plane.shape)}; "
                "positions (axes, tokens) go through apply_positions"
            )
        floating = plane.is_floating_point()
        if not floating or (self.borrow is None and self.one_hot):
            return plane[self.index.to(plane.device)]
        wide = torch.float64 if plane.dtype == torch.float64 else torch.float32
        dtype = plane.dtype
        if self.borrow is not None:
            plane = self.borrow.extend(plane)
        source, row = self.source.to(plane.device), self.row.to(plane.device)
        weight = self.weight.to(plane.device, wide).view(-1, *([1] * (plane.dim() - 1)))
        out = torch.zeros((self.index.numel(), *plane.shape[1:]), dtype=wide, device=plane.device)
        return out.index_add_(0, row, plane[source].to(wide) * weight).to(dtype)

    def apply_positions(self, positions: Tensor) -> Tensor:
        """Positions (P, N) of the kept rows, (P, K): each row takes its anchor's, nothing is renumbered."""
        if positions.dim() != 2 or positions.shape[1] != self.sources:
            raise ValueError(f"positions are (axes, {self.sources} tokens), got shape {tuple(positions.shape)}")
        return positions[:, self.index.to(positions.device)]

    def unmerge(self, rows: Tensor) -> Tensor:
        """Spread kept rows (K, ...) back over the tokens, (N, ...): each token gets the mean of the rows it fell in, weighted
        by its share |W|; a token in no row gets 0. Exact undoing for one-hot rows, the usual approximation for merges.

        >>> Reduction.prune(torch.tensor([0, 2]), torch.tensor([0, 2]), sources=3).unmerge(torch.tensor([5.0, 7.0]))
        tensor([5., 0., 7.])
        """
        if rows.shape[0] != self.index.numel():
            raise ValueError(
                f"unmerge takes one entry for each of the {self.index.numel()} kept rows, got {rows.shape[0]}"
            )
        own = self.source < self.sources
        source, row, weight = self.source[own], self.row[own], self.weight[own].abs()
        total = weight.new_zeros(self.sources).index_add_(0, source, weight)
        share = (weight / total[source].clamp_min(1e-300)).to(rows.dtype).view(-1, *([1] * (rows.dim() - 1)))
        out = rows.new_zeros((self.sources, *rows.shape[1:]))
        return out.index_add_(0, source, rows[row] * share)

    def log_sizes(self) -> Tensor:
        """(K,) float32 log of `sizes`: what ToMe adds to attention logits so that a merged key weighs as its tokens did."""
        return self.sizes.clamp_min(1).float().log()

    def then(self, second: Reduction) -> Reduction:
        """Both reductions in one: W = W2 W1, `second` made of the rows that this one kept. One rank only.

        >>> one = Reduction.prune(torch.tensor([0, 2, 3]), torch.tensor([0, 3]), sources=5)
        >>> one.then(Reduction.prune(torch.tensor([1, 2]), torch.tensor([0, 2]), sources=3)).index
        tensor([2, 3])
        """
        if self.borrow is not None or second.borrow is not None:
            raise ValueError("reductions that draw on other ranks' rows cannot be joined; join them on one rank")
        if second.sources != self.index.numel():
            raise ValueError(f"the second reduction is of {second.sources} rows, the first kept {self.index.numel()}")
        # Entry (row, s) of W2 meets every entry of row s of W1; equal (row, source) pairs add up.
        starts = torch.searchsorted(self.row, torch.arange(self.index.numel() + 1, device=self.row.device))
        lengths = starts.diff()[second.source]
        entry = torch.repeat_interleave(lengths)
        begins = lengths.cumsum(0) - lengths
        inner = starts[second.source[entry]] + torch.arange(entry.numel(), device=entry.device) - begins[entry]
        key, place = (second.row[entry] * self.sources + self.source[inner]).unique(return_inverse=True)
        weight = torch.zeros(key.numel(), dtype=torch.float64, device=key.device)
        weight.index_add_(0, place, second.weight[entry] * self.weight[inner])
        row, source = key // self.sources, key % self.sources
        sizes = torch.zeros_like(second.sizes).index_add_(0, second.row, self.sizes[second.source])
        index = self.index[second.index]
        where = self.global_index[second.index]
        return replace(
            self,
            index=index,
            cu_seqlens=second.cu_seqlens,
            row=row,
            source=source,
            weight=weight,
            sizes=sizes,
            global_index=where,
        )

    def dense(self) -> Tensor:
        """W as a (K, N) float64 matrix, borrowed rows behind the own ones, for looking at and for tests."""
        columns = self.sources + (0 if self.borrow is None else self.borrow.count)
        matrix = torch.zeros(self.index.numel(), columns, dtype=torch.float64, device=self.index.device)
        return matrix.index_put_((self.row, self.source), self.weight, accumulate=True)

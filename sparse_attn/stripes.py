"""The plan: which columns each group of rows attends to beyond its anchor region, as compressed rows.

    list r = (group * batch + entry) * heads + head  holds  indices[indptr[r] : indptr[r + 1]], ascending rows of k

One format for every way of finding stripes, for the baselines and for all executors. Memory is what is kept, never groups x keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sparse_attn.geometry import Geometry, Group


@dataclass(frozen=True, eq=False)
class StripePlan:
    """Columns per group and query head (`share="query"`) or key head (`share="key"`).

    `path` is "sparse", or "dense" where plain attention is to run; `why` says what decided.
    """

    geometry: Geometry
    batch: int
    q_heads: int
    kv_heads: int
    share: str
    indptr: Tensor
    """int64 (lists + 1), on the CPU."""
    indices: Tensor
    """int32 (kept), beside q."""
    keep: Tensor | None = None
    """int64, ascending rows of k that belong to the anchor region of every group they precede; None for none."""
    path: str = "sparse"
    why: str = ""

    def __repr__(self) -> str:
        rows = f"batch {self.batch}, {self.q_heads} query heads, {self.kv_heads} key heads"
        kept = f"{self.path}, {self.indices.numel()} columns kept in {len(self.indptr) - 1} lists"
        return f"StripePlan({rows}: {kept}, density {self.density:.4g}{f'; {self.why}' if self.why else ''})"

    @classmethod
    def dense(
        cls, geometry: Geometry, batch: int, q_heads: int, kv_heads: int, device: torch.device, why: str
    ) -> StripePlan:
        """Plain causal attention, in the format of a plan."""
        lists = len(geometry.groups) * batch * q_heads
        nothing = torch.empty(0, dtype=torch.int32, device=device)
        indptr = torch.zeros(lists + 1, dtype=torch.int64)
        return cls(geometry, batch, q_heads, kv_heads, "query", indptr, nothing, path="dense", why=why)

    @classmethod
    def of_columns(
        cls,
        geometry: Geometry,
        shape: tuple[int, int, int],
        share: str,
        columns: Sequence[Tensor],
        keep: Tensor | None = None,
        why: str = "",
    ) -> StripePlan:
        """From one ascending list a group, batch entry and head, in that order; `shape` is (batch, q heads, key heads)."""
        counts = torch.tensor([0, *(len(c) for c in columns)], dtype=torch.int64)
        indices = torch.cat([c.to(torch.int32) for c in columns]) if columns else torch.empty(0, dtype=torch.int32)
        return cls(geometry, *shape, share, counts.cumsum(0), indices, keep, why=why)

    @property
    def heads(self) -> int:
        """How many heads have lists of their own."""
        return self.q_heads if self.share == "query" else self.kv_heads

    @property
    def counts(self) -> Tensor:
        """int64 (groups, batch, heads): columns of each list."""
        return self.indptr.diff().view(len(self.geometry.groups), self.batch, self.heads)

    def columns(self, group: int, entry: int, head: int) -> Tensor:
        """One list: ascending int32 rows of k. Groups, batch entries and heads (those that have lists) count from 0."""
        groups = len(self.geometry.groups)
        if not (0 <= group < groups and 0 <= entry < self.batch and 0 <= head < self.heads):
            raise ValueError(
                f"got group {group}, entry {entry}, head {head}; the plan has {groups} groups, {self.batch} batch entries and "
                f"{self.heads} heads with lists"
            )
        first = (group * self.batch + entry) * self.heads + head
        return self.indices[int(self.indptr[first]) : int(self.indptr[first + 1])]

    def lists(self, group: int) -> list[Tensor]:
        """The lists of one group, batch entries outermost."""
        first, count = group * self.batch * self.heads, self.batch * self.heads
        cuts = self.indptr[first : first + count + 1].tolist()
        return [self.indices[a:b] for a, b in pairwise(cuts)]

    def kept(self, group: Group) -> Tensor:
        """The rows of `keep` among a group's candidates: what its anchor region holds beside initial block and window."""
        if self.keep is None:
            return torch.empty(0, dtype=torch.int64, device=self.indices.device)
        return within(self.keep, group.candidates)

    @property
    def density(self) -> float:
        """Computed pairs / causal pairs, anchor region included."""
        if self.path == "dense" or not self.counts.numel():
            return 1.0
        g = self.geometry
        rows = torch.tensor([x.count for x in g.groups], dtype=torch.float64)
        stripes = float((self.counts.double().mean(dim=(1, 2)) * rows).sum())
        kept = sum(len(self.kept(x)) * x.count for x in g.groups) if self.keep is not None else 0
        return (g.anchor_pairs + kept + stripes) / max(1, g.causal_pairs)

    @property
    def stripe_density(self) -> float:
        """The paper's ratio: kept columns / (N^2 / 2G) a head, without the anchor region."""
        if self.path == "dense" or not self.counts.numel():
            return 0.0
        g = self.geometry
        per_head = float(self.counts.double().mean(dim=(1, 2)).sum())
        return per_head / max(1.0, g.causal_pairs / g.rows)

    def check(self, q: Tensor, k: Tensor) -> None:
        """ValueError unless the plan is for tensors of these shapes, on their device."""
        planned = (self.batch, self.geometry.queries, self.q_heads), (self.batch, self.geometry.keys, self.kv_heads)
        given = tuple(q.shape[:3]), tuple(k.shape[:3])
        if planned != given:
            raise ValueError(
                f"the plan is for q {planned[0]} and k {planned[1]} (batch, rows, heads), got q {given[0]} and k {given[1]}; "
                "make the plan from these tensors"
            )
        if self.indices.device != q.device:
            raise ValueError(f"the plan is on {self.indices.device} and q on {q.device}; use plan.to(q.device)")

    def to(self, device: torch.device | str) -> StripePlan:
        """The same plan with its columns on another device."""
        keep = None if self.keep is None else self.keep.to(device)
        shape = self.geometry, self.batch, self.q_heads, self.kv_heads, self.share, self.indptr
        return StripePlan(*shape, self.indices.to(device), keep, self.path, self.why)

    def dense_mask(self, entry: int, q_head: int) -> Tensor:
        """bool (queries, keys): the pairs that a head attends to. For tests and pictures of short sequences."""
        if not (0 <= entry < self.batch and 0 <= q_head < self.q_heads):
            raise ValueError(
                f"got entry {entry}, head {q_head}; the plan has {self.batch} batch entries and {self.q_heads} heads"
            )
        g = self.geometry
        mask = torch.zeros(g.queries, g.keys, dtype=torch.bool)
        head = q_head if self.share == "query" else q_head * self.kv_heads // self.q_heads
        for number, group in enumerate(g.groups):
            rows = mask[slice(*group.rows)]
            start = g.documents[group.document][1][0]
            own = torch.ones(group.count, group.diagonal + group.count - start, dtype=torch.bool)
            if self.path == "dense":
                rows[:, start : group.diagonal + group.count] = own.tril(group.diagonal - start)
                continue
            rows[:, group.diagonal : group.diagonal + group.count] = own[:, : group.count].tril()
            for a, b in group.prefix:
                rows[:, a:b] = True
            rows[:, self.kept(group).cpu()] = True
            rows[:, self.columns(number, entry, head).cpu().long()] = True
        return mask


def within(ascending: Tensor, span: tuple[int, int]) -> Tensor:
    """The numbers of an ascending tensor inside a half-open span."""
    ends = torch.searchsorted(ascending, torch.tensor(span, dtype=ascending.dtype, device=ascending.device)).tolist()
    return ascending[ends[0] : ends[1]]

"""One rank's part of a call: anchor regions, who wants which rows, the rows, the sparse pass; and the way back.

    1  halo        keys and values of other shards that anchor regions need           then phase 1, as on one device
    2  summaries   of this rank's queries go to the owners of their candidates        while they travel: this rank's own groups
                                                                                      against its own keys
    3  lines       which rows an owner will send, and for which groups and heads
    4  rows        their keys and values, once for all groups and heads of a key head while they travel: phase 3 over the
    5              phase 3 over what came                                             columns that this rank holds

Backward: dk and dv of the rows that came go home the way they came, while this rank computes those of the rows it holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attn.anchor import Kernel, fine_grained_sparse, pattern_based_anchor
from sparse_attn.config import AnchorConfig
from sparse_attn.distributed.cut import Cut, rows_of
from sparse_attn.distributed.exchange import Counts, Wire, halo_plan
from sparse_attn.distributed.lists import Lines, Wanted
from sparse_attn.distributed.local import local_geometry, local_plan, position_geometry, positions_of
from sparse_attn.distributed.owner import Owner
from sparse_attn.distributed.sample import Sample
from sparse_attn.distributed.stages import Pair, Rows, Settled, one_stage, two_stages
from sparse_attn.distributed.stats import RankStats
from sparse_attn.distributed.summaries import Boxes, Means, Nothing, Summary
from sparse_attn.geometry import Geometry
from sparse_attn.identify.maximum import row_tops
from sparse_attn.kernels.choice import executor
from sparse_attn.kernels.state import AnchorState
from sparse_attn.stripes import StripePlan
from tokenring import AttentionShape
from tokenring.agreement import agree
from tokenring.transport import Transport


class Made(NamedTuple):
    """What backward needs of forward, and no more: what travelled lies in `far` alone."""

    wanted: Wanted
    sent: list[Tensor]
    counts: Counts
    """As in `Settled`."""
    near: Pair
    """Keys and values that this rank holds (B, own rows and halo and rows to keep, Hkv, D or Dv)."""
    far: Pair
    """Those that were sent for stripes."""
    near_plan: StripePlan
    far_plan: StripePlan


@dataclass
class Call:
    """A call on one rank whose arguments were found good; what backward needs is filled by forward."""

    runtime: Transport
    cut: Cut
    config: AnchorConfig
    scale: float
    kernel: str
    stats: RankStats
    options: tuple[object, ...]
    """What else all ranks must have said alike."""
    reports: bool = False
    """Whether statistics of all ranks are wanted."""
    number: int = 0
    """Of this call on its group."""
    made: Made | None = None
    """What forward leaves for backward."""

    @property
    def rank(self) -> int:
        return self.runtime.rank

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """out in the accumulator's dtype and lse, of this rank's rows; None where a sample prefers plain attention. Collective."""
        with self.runtime.shared_fate(), torch.autocast(q.device.type, enabled=False):
            wire, kernel = Wire(self.runtime), executor(self.kernel, q, v, self.scale)
            geometry, shape = local_geometry(self.cut, self.rank), (q.shape[0], q.shape[2], k.shape[2])
            first = self.cut.base(self.rank)
            keep = torch.arange(first, geometry.keys, device=k.device) if geometry.keys > first else None
            near = self._near(wire, k, v, shape[1])
            with self.stats.timed("anchor"):
                state = pattern_based_anchor(kernel, q, *near, geometry, keep)
                out, lse, _ = state
            with self.stats.timed("identify"):
                summary = self._summary(q, k, near[0], state, geometry, keep)
                lines = Owner(self.cut, wire, summary, k, shape[1] // shape[2]).decide()
                settled = self._settled(wire, lines, q, k, v, lse, near[0])
            self.stats.plans, self.stats.bytes_sent = wire.plans, wire.bytes_sent
            if settled is None:
                return None
            self._stripes_(kernel, out, lse, q, near, settled, geometry, keep)
            self._report(wire, q, k, v)
        return out, lse

    def _stripes_(
        self,
        kernel: Kernel,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        near: Pair,
        settled: Settled,
        geometry: Geometry,
        keep: Tensor | None,
    ) -> None:
        """Columns that this rank holds join (out, lse) while the others are under way; then those."""
        wanted, shape = settled.wanted, (q.shape[0], q.shape[2], near[0].shape[2])
        with self.stats.timed("stripes"):
            near_plan, far_plan = (
                local_plan(geometry, self.cut, self.rank, wanted.some(which), self.config.share, shape, kept)
                for which, kept in ((~wanted.far, keep), (wanted.far, None))
            )
            fine_grained_sparse(kernel, out, lse, q, *near, near_plan)
        with self.stats.timed("exchange"):
            far = settled.far(shape[0], shape[2])
        with self.stats.timed("stripes"):
            if len(far_plan.indices):
                fine_grained_sparse(kernel, out, lse, q, *far, far_plan)
        self.made = Made(wanted, settled.sent, settled.counts, near, far, near_plan, far_plan)

    def _near(self, wire: Wire, k: Tensor, v: Tensor, q_heads: int) -> Pair:
        """Keys and values that this rank will hold: its own, its halo's, and those to keep once more, side by side. All ranks
        have agreed on the call by then."""
        cut, (batch, _, kv_heads, dim) = self.cut, k.shape
        lengths = cut.layout.total, cut.kv_layout.total
        halo = halo_plan(cut, AttentionShape(batch, *lengths, q_heads, kv_heads, dim, v.shape[3], k.dtype))
        self.number = agree(self.runtime, halo, self.options)
        with self.stats.timed("exchange"):
            arrived = wire.begin(halo, (k, v), packed=False).land()
        keys, values = (torch.cat(pair, 1) for pair in zip((k, v), arrived))
        kept = self.kept_rows.to(k.device)
        if len(kept):
            keys, values = (torch.cat([x, x.index_select(1, kept)], 1) for x in (keys, values))
        return keys, values

    def _settled(
        self, wire: Wire, lines: list[Tensor], q: Tensor, k: Tensor, v: Tensor, lse: Tensor, near: Tensor
    ) -> Settled | None:
        """Every wanted row under way; None where the sample prefers plain attention."""
        shape, dim = (q.shape[0], q.shape[2], k.shape[2]), (q.shape[3] + v.shape[3]) // 2
        sample = Sample(self.cut, self.config, shape, dim)

        def stop(passed: list[Tensor], kept: list[Tensor]) -> bool:
            if not sample.asked:
                return False
            dense, self.stats.why = sample.prefers_dense(wire, passed, kept)
            self.stats.path = "dense" if dense else "sparse"
            return dense

        if self.config.identify in ("pooled", "lse"):
            return one_stage(self.cut, wire, lines, k, v, stop)
        return two_stages(self.cut, wire, lines, Rows.testing(q, lse, self.config, self.scale), k, v, near, stop)

    @property
    def kept_rows(self) -> Tensor:
        """int64: rows of [own rows, halo] that hold the positions to keep."""
        spans = ((row, row + 1) for row in self.cut.kept(self.rank))
        return rows_of(self.cut.prefixes(self.rank, spans))

    def _report(self, wire: Wire, q: Tensor, k: Tensor, v: Tensor) -> None:
        """What this rank did, and where statistics were asked for what all ranks did together."""
        stats, cut, rank, wanted = self.stats, self.cut, self.rank, self.made.wanted
        (batch, own, kv_heads, _), q_heads = k.shape, q.shape[2]
        if not self.reports:
            return
        keep = torch.tensor(cut.keep, dtype=torch.int64, device=k.device) if cut.keep else None
        lines = Lines(wanted.heads, positions_of(cut, wanted), wanted.words)
        geometry, shape = position_geometry(cut, rank), (batch, q_heads, kv_heads)
        stats.plan = local_plan(geometry, cut, rank, lines, self.config.share, shape, keep)
        columns = stats.plan.counts.double().sum((1, 2)) * (q_heads / stats.plan.heads)
        rows = torch.tensor([part.count for part in cut.parts[rank]], dtype=torch.float64)
        whole = torch.tensor([cut.group(part).count for part in cut.parts[rank]], dtype=torch.float64)
        pairs = cut.anchor_pairs(rank) * batch * q_heads + float((columns * rows).sum())
        heads = batch * kv_heads
        others = cut.halo_rows(rank) * heads + int(wanted.far.sum())
        mine = [pairs, float((columns * rows / whole).sum()), others, (cut.kv_layout.total - own) * heads]
        each = wire.agreed(mine, k.device, torch.float64)
        stats.of_ranks(each, batch * q_heads, cut.geometry)

    def _summary(
        self, q: Tensor, k: Tensor, near: Tensor, state: AnchorState, geometry: Geometry, keep: Tensor | None
    ) -> Summary:
        kind, lse = self.config.identify, state.lse
        if kind == "every":
            return Nothing(q)
        if kind == "rescore":
            return Boxes(self.cut, self.config, self.scale, q, k, lse, self._near_lengths(near, lse))
        anchor = lse if kind == "lse" else row_tops(state, q, near, geometry, self.scale, keep, self.config.scores)
        return Means(self.cut, self.config, self.scale, q, k, anchor)

    def _near_lengths(self, near: Tensor, lse: Tensor) -> Tensor:
        """(B, Hkv, groups): mean squared length of the keys of initial block and window, for the groups of this rank."""
        lengths = near.to(lse.dtype).square().sum(-1).transpose(1, 2)
        groups = self.cut.geometry.groups
        found = lengths.new_zeros(*lengths.shape[:2], len(groups))
        for number in self.cut.groups[self.rank]:
            prefix = self.cut.prefixes(self.rank, groups[number].prefix)
            found[:, :, number] = torch.cat([lengths[:, :, a:b] for a, b in prefix], 2).mean(2)
        return found

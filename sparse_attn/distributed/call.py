"""One rank's part of a call: anchor regions, who wants which rows, the rows, the sparse pass; and the way back.

    1  halo        keys and values of other shards that anchor regions need           then phase 1, as on one device
    2  summaries   of this rank's queries go to the owners of their candidates        each owner decides alone
    3  lines       which rows an owner will send, and for which groups and heads
    4  rows        their keys and values, once for all groups and heads of a key head
    5              phase 3 over a workspace [own rows, halo, rows of others head by head]

`rescore` and `every` take the keys of what passed first, let each row test them exactly, send the verdicts back, and take the
values of what is left. Backward: dk and dv of the workspace's rows go home the way they came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_attn.anchor import fine_grained_sparse, pattern_based_anchor
from sparse_attn.config import AnchorConfig
from sparse_attn.distributed.cut import Cut, rows_of
from sparse_attn.distributed.exchange import (
    agreed_counts,
    halo_plan,
    mirrored,
    row_plan,
    run_halo,
    run_rows,
)
from sparse_attn.distributed.lists import BITS, Wanted, lines_of, set_bits_, words_for
from sparse_attn.distributed.local import LocalGeometry, columns_of, local_plan, query_heads_of
from sparse_attn.distributed.stats import RankStats
from sparse_attn.distributed.summaries import Boxes, Flats, Means, Nothing, Summary
from sparse_attn.gradients import gradients
from sparse_attn.identify.maximum import row_maxima
from sparse_attn.identify.products import column_maximum, test_dtype, with_anchor, with_ones
from sparse_attn.identify.rows import near_length
from sparse_attn.kernels.blocks import Blocks
from sparse_attn.kernels.torch_kernel import TorchKernel
from sparse_attn.stripes import StripePlan
from tokenring import AttentionShape, Plan
from tokenring.agreement import agree
from tokenring.merge import accumulator_dtype
from tokenring.transport import Transport

TWO_STAGES = ("rescore", "every")


@dataclass
class Call:
    """A call on one rank whose arguments were found good."""

    runtime: Transport
    cut: Cut
    config: AnchorConfig
    scale: float
    kernel: str
    stats: RankStats
    options: tuple[object, ...]
    """What else all ranks must have said alike."""
    number: int = 0
    sent: list[Tensor] = field(default_factory=list)
    """For each rank, the lines of the rows that it got from here in the end."""
    wanted: Wanted | None = None
    plan: StripePlan | None = None
    workspace: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        return self.runtime.rank

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out in the accumulator's dtype and lse, of this rank's rows. Collective."""
        shape = AttentionShape(
            q.shape[0], self.cut.layout.total, self.cut.layout.total, q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype
        )
        halo = halo_plan(self.cut, shape)
        with self.runtime.shared_fate(), torch.autocast(q.device.type, enabled=False):
            self.number = agree(self.runtime, halo, self.options)
            with self.stats.timed("halo"):
                near = tuple(torch.cat(pair, 1) for pair in zip((k, v), run_halo(self._counted(halo), self.runtime, k, v)))
            geometry = LocalGeometry.of(self.cut, self.rank)
            kernel = TorchKernel(self.kernel, q, v, self.scale)
            with self.stats.timed("anchor"):
                out, lse = pattern_based_anchor(kernel, q, *near, geometry)
            with self.stats.timed("identify"):
                lines = self._decided(self._summary(q, k, near[0], lse, geometry), q, k)
            exchange = self._two_stages if self.config.identify in TWO_STAGES else self._one_stage
            self.workspace = exchange(lines, q, k, v, lse, near)
            assert self.wanted is not None
            self.plan = local_plan(geometry, self.cut, self.rank, self.wanted, self.config.share, q.shape[2], k.shape[2])
            with self.stats.timed("stripes"):
                return fine_grained_sparse(kernel, out, lse, q, *self.workspace, self.plan)

    # -- phase 2: summaries out, lines back ------------------------------------------------------------------------------

    def _summary(self, q: Tensor, k: Tensor, near: Tensor, lse: Tensor, geometry: LocalGeometry) -> Summary:
        kind = self.config.identify
        if kind == "every":
            return Nothing(q)
        if kind == "rescore":
            return Boxes(self.cut, self.config, self.scale, q, k, lse, self._near_lengths(near, lse))
        anchor = row_maxima(q, near, geometry, self.scale, None) if kind == "pooled" else lse
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

    def _decided(self, summary: Summary, q: Tensor, k: Tensor) -> list[Tensor]:
        """For each rank the lines of this rank's rows that its groups want."""
        flats = self._told(summary)
        heads, each = k.shape[0] * k.shape[2], q.shape[2] // k.shape[2]
        width = words_for(max(map(len, self.cut.groups)) * each)
        candidates = self.cut.candidates[self.rank]
        lines = []
        for groups in self.cut.groups:
            words = torch.zeros(heads, k.shape[1], width, dtype=torch.int32, device=k.device)
            for place, number in enumerate(groups):
                rows = candidates.get(number)
                if rows is None:
                    continue
                wanted = summary.wanted(number, flats[number], rows).unflatten(1, (k.shape[2], each)).flatten(0, 1)
                here = rows_of(rows, k.device)
                wanted &= ~self._kept_anyway[here].to(k.device)
                for head in range(each):
                    word, shift = divmod(place * each + head, BITS)
                    words[:, here, word] |= wanted[:, head].to(torch.int32) << shift
            lines.append(lines_of(words))
        return lines

    @property
    def _kept_anyway(self) -> Tensor:
        """bool (own rows): in every later anchor region, so never a stripe."""
        positions = self.cut.layout.positions(self.rank)
        return torch.isin(positions, torch.tensor(self.cut.keep, dtype=torch.int64))

    def _told(self, summary: Summary) -> dict[int, list]:
        """For each group with candidates here, its parts and their numbers: those of this rank, and what others told."""
        cut = self.cut
        asked = [[p for p in parts if p.group in owned] for owned in cut.candidates for parts in cut.parts]
        told = [asked[owner * cut.world : (owner + 1) * cut.world] for owner in range(cut.world)]
        counts = tuple(
            tuple(sum(map(summary.size, told[o][s])) if o != s else 0 for o in range(cut.world)) for s in range(cut.world)
        )
        mine = {part: summary.of_part(part) for part in cut.parts[self.rank] if part.group in cut.holders}
        packed = [mine[p] for o in range(cut.world) if o != self.rank for p in told[o][self.rank]]
        empty = torch.empty(0, dtype=summary.dtype, device=self.workspace_device(mine))
        plan = self._counted(row_plan("summaries", counts, summary.dtype, 1))
        (arrived,) = run_rows(plan, self.runtime, torch.cat([*packed, empty])[:, None])
        found: dict[int, list] = {}
        here = told[self.rank]
        sizes = [summary.size(p) for s in range(cut.world) if s != self.rank for p in here[s]]
        others = iter(arrived.flatten().split(sizes))
        for source in range(cut.world):
            for part in here[source]:
                found.setdefault(part.group, []).append((part, mine[part] if source == self.rank else next(others)))
        return found

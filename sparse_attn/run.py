"""One call on one device: which path, then the phases in order."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_attn import cost
from sparse_attn.anchor import difference_aware_stripes, fine_grained_sparse, pattern_based_anchor
from sparse_attn.config import AnchorConfig
from sparse_attn.geometry import Geometry, Group
from sparse_attn.identify import finder
from sparse_attn.kernels.torch_kernel import TorchKernel
from sparse_attn.stats import Stats
from sparse_attn.stripes import StripePlan
from tokenring.merge import accumulator_dtype, merge_

SAMPLES, SAMPLE_COLUMNS = 4, 128
"""What is looked at before the rest is tested: so many runs of so many candidates of one late group."""


@dataclass
class Run:
    """A call whose arguments were found good. `plan` may be given; else it is found."""

    geometry: Geometry
    config: AnchorConfig
    scale: float
    kernel: str
    keep: Tensor | None
    plan: StripePlan | None
    stats: Stats

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out in the accumulator's or q's dtype, and lse; `self.plan` says afterwards what was computed."""
        with torch.autocast(q.device.type, enabled=False):
            kernel = TorchKernel(self.kernel, q, v, self.scale)
            dense = self._dense_from_the_start(q, k) if self.plan is None else self.plan.path == "dense"
            if dense:
                with self.stats.timed("dense"):
                    return dense_attention(kernel, q, k, v, self.geometry)
            with self.stats.timed("anchor"):
                out, lse = pattern_based_anchor(kernel, q, k, v, self.geometry, self.keep)
            if self.plan is None:
                with self.stats.timed("identify"):
                    self.plan = self._found(q, k, lse)
            if self.plan.path == "dense":
                with self.stats.timed("dense"):
                    return finish_densely(kernel, out, lse, q, k, v, self.geometry)
            with self.stats.timed("stripes"):
                return fine_grained_sparse(kernel, out, lse, q, k, v, self.plan)

    def find(self, q: Tensor, k: Tensor) -> StripePlan:
        """The plan alone. The anchor region's lse needs no values: the keys stand in for them."""
        with torch.autocast(q.device.type, enabled=False):
            if self._dense_from_the_start(q, k):
                assert self.plan is not None
                return self.plan
            kernel = TorchKernel(self.kernel, q, k, self.scale)
            _, lse = pattern_based_anchor(kernel, q, k, k, self.geometry, self.keep)
            return self._found(q, k, lse)

    def _dense_from_the_start(self, q: Tensor, k: Tensor) -> bool:
        thetas = self.config.thetas(q.shape[2])
        if all(theta == math.inf for theta in thetas):
            self.plan = self._dense(q, k, "theta keeps every column")
        elif self.config.dense == "auto" and not all(theta == -math.inf for theta in thetas):
            worth, why = cost.pays(self.geometry, self.config)
            if not worth:
                self.plan = self._dense(q, k, why)
        return self.plan is not None

    def _found(self, q: Tensor, k: Tensor, lse: Tensor) -> StripePlan:
        why = "asked for"
        if self.config.dense == "auto":
            kept, passed = self._sampled(q, k, lse)
            # No call is saved by going on densely: the anchor region is done either way.
            g = self.geometry
            share = 1.0 if self.config.share == "query" else k.shape[2] / q.shape[2]
            sparse = cost.sparse_cost(g, share, self.config, kept, passed) - g.anchor_pairs
            why = f"modelled from a sample: {sparse / max(1, g.candidate_pairs):.2f} of dense beyond the anchor region"
            if sparse > g.candidate_pairs:
                return self._dense(q, k, why)
        plan = difference_aware_stripes(q, k, lse, self.geometry, self.config, self.scale, self.keep)
        return replace(plan, why=why)

    def _sampled(self, q: Tensor, k: Tensor, lse: Tensor) -> tuple[float, float]:
        """Shares of some candidates that are kept, and that pass a bound."""
        groups = [g for g in self.geometry.groups if g.candidate_keys >= SAMPLES * SAMPLE_COLUMNS]
        if not groups:
            return cost.LIKELY_STRIPES, cost.LIKELY_PASSED
        searching = finder(q, k, lse, self.geometry, self.config, self.scale, self.keep)
        spans = [_span(groups[-1], part) for part in range(SAMPLES)]
        kept = torch.cat([searching.kept(span, 0) for span in spans], 1)
        passed = torch.cat([searching.passed(span, 0) for span in spans], 1)
        return float(kept.double().mean()), float(passed.double().mean())

    def _dense(self, q: Tensor, k: Tensor, why: str) -> StripePlan:
        return StripePlan.dense(self.geometry, q.shape[0], q.shape[2], k.shape[2], q.device, why)


def _span(group: Group, part: int) -> Group:
    """The group with one evenly placed run of its candidates."""
    first, last = group.candidates
    start = first + (last - first - SAMPLE_COLUMNS) * part // max(1, SAMPLES - 1)
    return replace(group, candidates=(start, start + SAMPLE_COLUMNS))


def dense_attention(kernel: TorchKernel, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Plain causal attention, a document at a time, queries last."""
    if len(geometry.documents) == 1 and q.shape[1] == k.shape[1]:
        return kernel.blocks.attend(q, k, v, causal=True)
    out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=accumulator_dtype(q.dtype))
    lse = torch.full_like(out[..., 0], -torch.inf).transpose(1, 2).contiguous()
    for (qa, qb), (ka, kb) in geometry.documents:
        rows, own = slice(qa, qb), kb - (qb - qa)
        if qa == qb:
            continue
        part, part_lse = kernel.blocks.attend(q[:, rows], k[:, own:kb], v[:, own:kb], causal=True)
        out[:, rows], lse[:, :, rows] = part.to(out.dtype), part_lse
        if ka < own:
            merge_(out[:, rows], lse[:, :, rows], *kernel.blocks.attend(q[:, rows], k[:, ka:own], v[:, ka:own]))
    return out, lse


def finish_densely(
    kernel: TorchKernel, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """All candidates of every group join its rows' state: dense attention, the anchor region not computed again."""
    for group in geometry.groups:
        if group.candidate_keys:
            rows, keys = slice(*group.rows), slice(*group.candidates)
            merge_(out[:, rows], lse[:, :, rows], *kernel.blocks.attend(q[:, rows], k[:, keys], v[:, keys]))
    return out, lse

"""One call on one device: which path, then the phases in order."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from sparse_attn import cost
from sparse_attn.anchor import difference_aware_stripes, fine_grained_sparse, pattern_based_anchor
from sparse_attn.config import AnchorConfig
from sparse_attn.geometry import Geometry, Group
from sparse_attn.identify import finder
from sparse_attn.kernels.choice import block_kernel, executor
from sparse_attn.kernels.state import AnchorState
from sparse_attn.kernels.torch_kernel import TorchKernel
from sparse_attn.stats import Stats
from sparse_attn.stripes import StripePlan
from tokenring.merge import accumulator_dtype, merge_


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
    why: str = "asked for"
    """What decided the path."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out in the accumulator's or q's dtype, and lse; `self.plan` says afterwards what was computed."""
        with as_given(q):
            if self.plan is None:
                self.plan = self._dense_from_the_start(q, k, v.shape[3])
            kernel = executor(self.kernel, q, v, self.scale)
            if self.plan is not None and self.plan.path == "dense":
                with self.stats.timed("dense"):
                    return dense_attention(kernel, q, k, v, self.geometry)
            with self.stats.timed("anchor"):
                state = pattern_based_anchor(kernel, q, k, v, self.geometry, self.keep, self.config.needs_tops)
            if self.plan is None:
                with self.stats.timed("identify"):
                    self.plan = self._found(q, k, state)
            with self.stats.timed("stripes"):
                return fine_grained_sparse(kernel, state.out, state.lse, q, k, v, self.plan)

    def find(self, q: Tensor, k: Tensor) -> StripePlan:
        """The plan alone. The anchor region's lse needs no values: the keys stand in for them."""
        with as_given(q):
            dense = self._dense_from_the_start(q, k, k.shape[3])
            if dense is not None:
                return dense
            kernel = TorchKernel(block_kernel(self.kernel), q, k, self.scale)
            return self._found(
                q, k, pattern_based_anchor(kernel, q, k, k, self.geometry, self.keep, self.config.needs_tops)
            )

    def _found(self, q: Tensor, k: Tensor, state: AnchorState) -> StripePlan:
        plan = difference_aware_stripes(q, k, state, self.geometry, self.config, self.scale, self.keep)
        return replace(plan, why=self.why)

    def _dense_from_the_start(self, q: Tensor, k: Tensor, v_dim: int) -> StripePlan | None:
        """The dense plan where it is exact or cheaper; None to go on with stripes."""
        thetas = self.config.thetas(q.shape[2])
        if min(thetas) == math.inf:
            return self._dense(q, k, "theta keeps every column")
        if self.config.dense == "never" or max(thetas) == -math.inf:
            return None
        heads, dim = q.shape[0] * q.shape[2], (q.shape[3] + v_dim) // 2
        worth, self.why = cost.pays(self.geometry, self.config, heads, dim)
        if worth:
            with self.stats.timed("sample"):
                kept, passed = self._sampled(q, k)
            lists = 1.0 if self.config.share == "query" else k.shape[2] / q.shape[2]
            sparse = cost.sparse_cost(self.geometry, self.config, heads, dim, kept, passed, lists)
            share = sparse / max(1, self.geometry.causal_pairs)
            self.why = f"modelled from a sample: {share:.2f} of dense at {kept:.0%} of the candidates"
            worth = share < cost.WORTH
        return None if worth else self._dense(q, k, self.why)

    def _sampled(self, q: Tensor, k: Tensor) -> tuple[float, float]:
        """Shares of some candidates of the group with most of them that are kept, and that pass a bound."""
        geometry, group = self.geometry, max(self.geometry.groups, key=lambda g: g.candidate_keys)
        rows, keys = slice(*group.rows), k[:1].index_select(1, sampled_keys(geometry, group, k.device))
        alone = replace(geometry, documents=(((0, group.count), (0, keys.shape[1])),))
        kernel = TorchKernel(block_kernel(self.kernel), q, k, self.scale)
        state = kernel.anchor(q[:1, rows], keys, keys, alone, None, self.config.needs_tops)
        searching = finder(q[:1, rows], keys, state, alone, self.config, self.scale)
        kept, passed = searching.kept(alone.groups[0], 0), searching.passed(alone.groups[0], 0)
        return float(kept.double().mean()), float(passed.double().mean())

    def _dense(self, q: Tensor, k: Tensor, why: str) -> StripePlan:
        return _dense_plan(self.geometry, q.shape[0], q.shape[2], k.shape[2], q.device, why)


@lru_cache(maxsize=128)
def _dense_plan(
    geometry: Geometry, batch: int, q_heads: int, kv_heads: int, device: torch.device, why: str
) -> StripePlan:
    """Made once for calls that are alike: short ones are over before a plan is made."""
    return StripePlan.dense(geometry, batch, q_heads, kv_heads, device, why)


def sampled_keys(geometry: Geometry, group: Group, device: torch.device) -> Tensor:
    """Rows of k of a short document that ends in a whole group: the anchor region of `group` and the middle of its candidates.

    With the candidates of `cost.sampled`, initial block and window make whole groups: so the document's group is `group`.
    """
    first = group.candidates[0]
    near = group.diagonal - geometry.window, group.diagonal + group.count
    spans = (first - geometry.initial, first), cost.sampled(geometry, group), near
    return torch.cat([torch.arange(*span, device=device) for span in spans])


def as_given(q: Tensor) -> AbstractContextManager:
    """Attention runs in its inputs' dtype; entering a context costs as much as a short call, so only where one is needed."""
    kind = q.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


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

"""One call on one device: which path, then the phases in order."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attn import cost
from sparse_attn.anchor import difference_aware_stripes, fine_grained_sparse, pattern_based_anchor
from sparse_attn.config import AnchorConfig
from sparse_attn.cost import resolved
from sparse_attn.geometry import Geometry, Group, documents_of
from sparse_attn.identify import finder
from sparse_attn.kernels.blocks import Blocks
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
    sample: bool = False
    """Whether a sample decides between stripes and plain attention."""
    why: str = "asked for"
    """What decided the path."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out in the accumulator's or q's dtype, and lse; `self.plan` says afterwards what was computed."""
        with as_given(q):
            if self.sample:
                self.plan = self._asked_a_sample(q, k, v.shape[3])
            if self.plan is not None and self.plan.path == "dense":
                blocks = known_blocks(self.kernel, q.dtype, q.device, q.shape[3], v.shape[3], self.scale)
                with self.stats.timed("dense"):
                    return dense_attention(blocks, q, k, v, self.geometry)
            kernel = executor(self.kernel, q, v, self.scale)
            with self.stats.timed("anchor"):
                state = pattern_based_anchor(kernel, q, k, v, self.geometry, self.keep)
            if self.plan is None:
                with self.stats.timed("identify"):
                    self.plan = self._found(q, k, state)
            with self.stats.timed("stripes"):
                return fine_grained_sparse(kernel, state.out, state.lse, q, k, v, self.plan)

    def find(self, q: Tensor, k: Tensor) -> StripePlan:
        """The plan alone. The anchor region's lse needs no values: the keys stand in for them."""
        with as_given(q):
            if self.sample:
                self.plan = self._asked_a_sample(q, k, k.shape[3])
            if self.plan is not None:
                return self.plan
            kernel = TorchKernel(block_kernel(self.kernel), q, k, self.scale)
            return self._found(q, k, pattern_based_anchor(kernel, q, k, k, self.geometry, self.keep))

    def _found(self, q: Tensor, k: Tensor, state: AnchorState) -> StripePlan:
        plan = difference_aware_stripes(q, k, state, self.geometry, self.config, self.scale, self.keep)
        return replace(plan, why=self.why)

    def _asked_a_sample(self, q: Tensor, k: Tensor, v_dim: int) -> StripePlan | None:
        """The dense plan where a sample says that it is cheaper; None to go on with stripes."""
        heads, dim = q.shape[0] * q.shape[2], (q.shape[3] + v_dim) // 2
        with self.stats.timed("sample"):
            kept, passed = self._sampled(q, k)
        lists = 1.0 if self.config.share == "query" else k.shape[2] / q.shape[2]
        sparse = cost.sparse_cost(self.geometry, self.config, heads, dim, kept, passed, lists)
        share = sparse / max(1, self.geometry.causal_pairs)
        self.why = f"modelled from a sample: {share:.2f} of dense at {kept:.0%} of the candidates"
        if share < cost.WORTH:
            return None
        return StripePlan.dense(self.geometry, q.shape[0], q.shape[2], k.shape[2], q.device, self.why)

    def _sampled(self, q: Tensor, k: Tensor) -> tuple[float, float]:
        """Shares of some candidates of the group with most of them that are kept, and that pass a bound."""
        geometry, group = self.geometry, max(self.geometry.groups, key=lambda g: g.candidate_keys)
        rows, keys = slice(*group.rows), k[:1].index_select(1, sampled_keys(geometry, group, k.device))
        alone = replace(geometry, documents=(((0, group.count), (0, keys.shape[1])),))
        kernel = TorchKernel(block_kernel(self.kernel), q, k, self.scale)
        state = kernel.anchor(q[:1, rows], keys, keys, alone, None)
        searching = finder(q[:1, rows], keys, state, alone, self.config, self.scale)
        kept, passed = searching.kept(alone.groups[0], 0), searching.passed(alone.groups[0], 0)
        return float(kept.double().mean()), float(passed.double().mean())


class Opening(NamedTuple):
    """What shapes and configuration alone say of a call."""

    geometry: Geometry
    plan: StripePlan | None
    """Dense, where it is exact or modelled to be cheaper."""
    sample: bool
    """Whether a sample is to be asked."""
    why: str


Cuts = tuple[int, ...] | None
"""Cumulative lengths of packed documents."""


@lru_cache(maxsize=256)
def opening(
    q: torch.Size,
    k: torch.Size,
    v_dim: int,
    cuts: tuple[Cuts, Cuts],
    config: AnchorConfig,
    device: torch.device,
    threads: int,
) -> Opening:
    """Made once for calls that are alike, such as those of a model's layers: short ones are over before this is."""
    documents = documents_of(q[1], k[1], *cuts)
    longest = max((b - a for _, (a, b) in documents), default=0)
    geometry = Geometry.of(documents, *resolved(config, longest))
    thetas = config.thetas(q[2])
    dense, asked, why = False, False, "asked for"
    if min(thetas) == math.inf:
        dense, why = True, "theta keeps every column"
    elif config.dense == "auto" and max(thetas) > -math.inf:
        asked, why = cost.pays(geometry, config, q[0] * q[2], (q[3] + v_dim) // 2, threads)
        dense = not asked
    plan = StripePlan.dense(geometry, q[0], q[2], k[2], device, why) if dense else None
    return Opening(geometry, plan, asked, why)


def sampled_keys(geometry: Geometry, group: Group, device: torch.device) -> Tensor:
    """Rows of k of a short document that ends in a whole group: the anchor region of `group` and the middle of its candidates.

    With the candidates of `cost.sampled`, initial block and window make whole groups: so the document's group is `group`.
    """
    first = group.candidates[0]
    near = group.diagonal - geometry.window, group.diagonal + group.count
    spans = (first - geometry.initial, first), cost.sampled(geometry, group), near
    return torch.cat([torch.arange(*span, device=device) for span in spans])


@lru_cache(maxsize=64)
def known_blocks(kernel: str, dtype: torch.dtype, device: torch.device, dim: int, v_dim: int, scale: float) -> Blocks:
    """The block kernel of calls that are alike in all that its choice depends on."""
    q, v = (torch.empty(1, 1, 1, size, dtype=dtype, device=device) for size in (dim, v_dim))
    return executor(kernel, q, v, scale).blocks


def threads_of(q: Tensor) -> int:
    """How many threads share the work of one call."""
    return torch.get_num_threads() if q.device.type == "cpu" else 1


def as_given(q: Tensor) -> AbstractContextManager:
    """Attention runs in its inputs' dtype; entering a context costs as much as a short call, so only where one is needed."""
    kind = q.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def dense_attention(blocks: Blocks, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Plain causal attention, a document at a time, queries last."""
    if len(geometry.documents) == 1 and q.shape[1] == k.shape[1]:
        return blocks.attend(q, k, v, causal=True)
    out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=accumulator_dtype(q.dtype))
    lse = torch.full_like(out[..., 0], -torch.inf).transpose(1, 2).contiguous()
    for (qa, qb), (ka, kb) in geometry.documents:
        rows, own = slice(qa, qb), kb - (qb - qa)
        if qa == qb:
            continue
        part, part_lse = blocks.attend(q[:, rows], k[:, own:kb], v[:, own:kb], causal=True)
        out[:, rows], lse[:, :, rows] = part.to(out.dtype), part_lse
        if ka < own:
            merge_(out[:, rows], lse[:, :, rows], *blocks.attend(q[:, rows], k[:, ka:own], v[:, ka:own]))
    return out, lse

"""AnchorAttention in its three phases (arXiv 2505.23520, sections 3.2 to 3.4), each a function.

    1  pattern-based anchor      every row attends exactly to the initial block and to its window up to the diagonal;
                                 its state (out, lse) is kept in float32
    2  difference-aware stripes  a column is kept for a whole group of rows where anchor - score <= theta
    3  fine-grained computation  the kept columns are gathered and join each row's state by online softmax

The paper keeps m, l and acc of each row: out = acc / l, lse = m + log l and top = m say the same and are what merges need.
Anchor region and candidates are disjoint and together all keys before the group, so theta = infinity is dense attention.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sparse_attn.config import AnchorConfig
from sparse_attn.geometry import Geometry
from sparse_attn.identify import find_stripes
from sparse_attn.kernels.state import AnchorState
from sparse_attn.stripes import StripePlan


class Kernel(Protocol):
    """An executor of both passes; see `sparse_attn.kernels`."""

    def anchor(self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, keep: Tensor | None) -> AnchorState:
        """Phase 1."""

    def stripes_(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: StripePlan) -> None:
        """Phase 3, in place."""


def pattern_based_anchor(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    keep: Tensor | None = None,
) -> AnchorState:
    """Phase 1: out (B, Sq, Hq, Dv), lse and top (B, Hq, Sq) of each row's anchor region, float32 (float64 for float64).

        I = {0 .. b-1},  W_g = {a_g - b .. i},  a_g the first row of row i's group
        top_i = max over I and W_g of s_ij,   lse_i = log sum of exp(s_ij),   out_i = sum of exp(s_ij - lse_i) v_j

    `keep` joins further rows of k to the region, wherever they precede the group: visual tokens of a multimodal prompt.
    """
    return kernel.anchor(q, k, v, geometry, keep)


def difference_aware_stripes(
    q: Tensor,
    k: Tensor,
    state: AnchorState,
    geometry: Geometry,
    config: AnchorConfig,
    scale: float,
    keep: Tensor | None = None,
) -> StripePlan:
    """Phase 2: the columns j of C_g = {b .. a_g - b - 1} that each group keeps, as compressed rows.

    kept  <=>  anchor - score_j <= theta   for what `config.identify` lets stand for the group's rows
    """
    return find_stripes(q, k, state, geometry, config, scale, keep)


def fine_grained_sparse(
    kernel: Kernel, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: StripePlan
) -> tuple[Tensor, Tensor]:
    """Phase 3: each group's columns join (out, lse) of its rows, in place. Every kept column precedes its group: no mask."""
    kernel.stripes_(out, lse, q, k, v, plan)
    return out, lse

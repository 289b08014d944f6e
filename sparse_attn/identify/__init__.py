"""Difference-aware stripe identification: which candidate columns a group of rows keeps.

    keep column j  <=>  max over what stands for the group's rows of (score_j - anchor) >= -theta

No softmax, no sort, no top-k: each column is judged alone, so whoever holds the key can judge it.

name      stands for the rows                       anchor                          reads, of the products q k^T
pooled    mean query of each block (the paper)      mean row maximum of the block   1 / block
lse       mean query of each block                  mean log-sum-exp                1 / block
rescore   every query, of columns that pass a       the row's own log-sum-exp       2 / box for the bound, then
          bound by boxes of queries                                                 what passes
every     every query                               the row's own log-sum-exp       all

Means hide a column that one query of a block wants: retrieval and copying depend on such columns. With a row's own log-sum-exp
the test says what it does: the column's weight, beside the anchor region alone, is exp(-theta) or more for some row.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sparse_attn.config import AnchorConfig
from sparse_attn.geometry import Geometry, Group
from sparse_attn.identify.means import MeanFinder
from sparse_attn.identify.rows import EveryFinder, RescoreFinder
from sparse_attn.kernels.state import AnchorState
from sparse_attn.stripes import StripePlan, within


class Finder(Protocol):
    """One way of finding stripes, ready for one call."""

    def kept(self, group: Group, entry: int) -> Tensor:
        """bool (Hq, candidates of the group): the columns that each query head keeps."""

    def passed(self, group: Group, entry: int) -> Tensor:
        """bool (Hq, candidates of the group): the columns whose last test is asked; what it costs depends on them."""


def finder(
    q: Tensor,
    k: Tensor,
    state: AnchorState,
    geometry: Geometry,
    config: AnchorConfig,
    scale: float,
    keep: Tensor | None = None,
) -> Finder:
    """The finder that a configuration names.

    Args:
        q: (B, Sq, Hq, D). k: (B, Sk, Hkv, D). state: of the anchor region.
        keep: rows of k that belong to every anchor region.
    """
    if config.identify in ("pooled", "lse"):
        return MeanFinder(q, k, state, geometry, config, scale, keep)
    kind = EveryFinder if config.identify == "every" else RescoreFinder
    return kind(q, k, state.lse, geometry, config, scale)


def columns_of(kept: Tensor, group: Group, share: str, kv_heads: int, keep: Tensor | None) -> list[Tensor]:
    """Ascending int32 rows of k for each list of a group's batch entry, out of what its query heads keep."""
    if keep is not None:
        kept[:, within(keep, group.candidates) - group.candidates[0]] = False
    if share == "key":
        kept = kept.unflatten(0, (kv_heads, -1)).any(1)
    found, heads = kept.flatten().nonzero()[:, 0], len(kept)
    edges = torch.arange(1, heads, device=kept.device) * kept.shape[1]
    lists = found.tensor_split(torch.searchsorted(found, edges).tolist())
    return [(x + (group.candidates[0] - n * kept.shape[1])).to(torch.int32) for n, x in enumerate(lists)]


def find_stripes(
    q: Tensor,
    k: Tensor,
    state: AnchorState,
    geometry: Geometry,
    config: AnchorConfig,
    scale: float,
    keep: Tensor | None = None,
) -> StripePlan:
    """The plan of a call whose anchor region gave `state`; arguments as for `finder`."""
    heads = q.shape[2] if config.share == "query" else k.shape[2]
    searching = finder(q, k, state, geometry, config, scale, keep)
    columns: list[Tensor] = []
    for group in geometry.groups:
        for entry in range(q.shape[0]):
            if group.candidate_keys:
                kept = searching.kept(group, entry)
                columns += columns_of(kept, group, config.share, k.shape[2], keep)
            else:
                columns += [torch.empty(0, dtype=torch.int32, device=q.device)] * heads
    return StripePlan.of_columns(geometry, (q.shape[0], q.shape[2], k.shape[2]), config.share, columns, keep)

"""What each theta would compute and lose, for every head of a layer: the ground that `tune` chooses on.

A column c of a group is kept from some theta on, theta_c. With w_ic the dense softmax weight of row i on column c,

    pairs(theta)   = (anchor pairs + share of columns with theta_c <= theta * candidate pairs) / causal pairs
    lost(theta)    = mean over rows of  l_i(theta) = sum of w_ic over columns with theta_c > theta
    squared(theta) = mean over rows of  l_i(theta)^2

all from one look at a few groups, evenly spread: no theta is tried by attending with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_attn.anchor import pattern_based_anchor
from sparse_attn.arguments import check
from sparse_attn.config import AnchorConfig
from sparse_attn.cost import resolved
from sparse_attn.distributed.local import LocalGeometry
from sparse_attn.geometry import Geometry, Group, geometry_of
from sparse_attn.identify import finder
from sparse_attn.identify.means import MeanFinder
from sparse_attn.kernels.choice import block_kernel
from sparse_attn.kernels.state import AnchorState
from sparse_attn.kernels.torch_kernel import TorchKernel

THETAS = torch.linspace(-6, 18, 241, dtype=torch.float64)
BOUNDS = THETAS[::5]
"""Where the bound of `rescore` is tried: it seldom decides, and the exact test beside it is not rounded."""


@dataclass(frozen=True)
class Curves:
    """Of one layer; float64 (Hq, thetas), for `THETAS`. At -infinity a head computes its anchor region alone."""

    pairs: Tensor
    lost: Tensor
    squared: Tensor

    @classmethod
    def mean(cls, curves: Sequence[Curves]) -> Curves:
        """Over samples."""
        return cls(*(torch.stack([getattr(c, name) for c in curves]).mean(0) for name in ("pairs", "lost", "squared")))

    def at(self, thetas: Sequence[float]) -> tuple[Tensor, Tensor]:
        """(Hq) pairs and lost at one theta for each head; at the next greater one that was looked at."""
        found = torch.searchsorted(THETAS, torch.tensor(thetas, dtype=torch.float64)).clamp(max=len(THETAS) - 1)
        return tuple(x.gather(1, found[:, None])[:, 0] for x in (self.pairs, self.lost))


def curves(q: Tensor, k: Tensor, config: AnchorConfig, scale: float | None = None, groups: int = 8) -> Curves:
    """Look at some groups of one layer's queries (B, S, Hq, D) and keys (B, S, Hkv, D); the mean over batch entries.

    Args:
        config: how columns are found; its thetas do not matter.
        groups: how many groups are looked at, evenly spread; all where there are no more.

    >>> q, k = torch.randn(1, 300, 2, 16), torch.randn(1, 300, 1, 16)
    >>> found = curves(q, k, AnchorConfig(block=8, step=4, dense="never"))
    >>> bool((found.lost.diff() <= 0).all()), bool((found.pairs.diff() >= 0).all()), found.pairs[0, -1].item()
    (True, True, 1.0)
    """
    check(q, k, k, scale)
    if q.shape[1] != k.shape[1] or groups < 1:
        raise ValueError(
            f"got {q.shape[1]} queries, {k.shape[1]} keys, groups={groups}; give q and k of a whole text, and 1 group or more"
        )
    scale, length = 1 / math.sqrt(q.shape[-1]) if scale is None else scale, q.shape[1]
    geometry = geometry_of((((0, length), (0, length)),), *resolved(config, length))
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        entries = [_entry(q[i : i + 1], k[i : i + 1], geometry, config, scale, groups) for i in range(q.shape[0])]
    return Curves.mean(entries)


def _entry(q: Tensor, k: Tensor, geometry: Geometry, config: AnchorConfig, scale: float, count: int) -> Curves:
    heads, known = q.shape[2], [g for g in geometry.groups if g.candidate_keys]
    kept, lost, squared = (torch.zeros(heads, len(THETAS), dtype=torch.float64) for _ in range(3))
    columns = rows = 0
    step = max(1.0, len(known) / count)
    for number in range(min(count, len(known))):
        group = known[int((number + 0.5) * step)]
        for head, (needed, weights) in enumerate(_columns(q, k, geometry, group, config, scale)):
            bins = torch.searchsorted(THETAS, needed)
            row_mass = weights.new_zeros(group.count, len(THETAS) + 1).index_add_(1, bins.to(weights.device), weights)
            left = row_mass.flip(1).cumsum(1).flip(1)[:, 1:].double().cpu().clamp(min=0)
            lost[head] += left.sum(0)
            squared[head] += left.square().sum(0)
            kept[head] += torch.bincount(bins, minlength=len(THETAS) + 1).cumsum(0)[:-1] * group.count
        columns += group.candidate_keys * group.count
        rows += group.count
    share = kept / max(1, columns)
    pairs = (geometry.anchor_pairs + share * geometry.candidate_pairs) / max(1, geometry.causal_pairs)
    within = sum(g.count for g in known) / max(1, geometry.queries) / max(1, rows)
    return Curves(pairs, lost * within, squared * within)


def _columns(
    q: Tensor, k: Tensor, geometry: Geometry, group: Group, config: AnchorConfig, scale: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each query head: from which theta on each candidate is kept, float64 (C), and every row's weight on it, (rows, C)."""
    rows, keys = slice(*group.rows), slice(0, group.diagonal + group.count)
    q, k = q[:, rows], k[:, keys]
    near, g = replace(group, rows=(0, group.count)), geometry
    sizes = g.block, g.step, g.initial, g.window
    alone = LocalGeometry((((0, group.count), (0, k.shape[1])),), *sizes, (near,))
    kernel = TorchKernel(block_kernel("auto"), q, k, scale)
    state = pattern_based_anchor(kernel, q, k, k, alone)
    lse = state.lse
    needed, exact = _from_finder(q, k, state, alone, near, config, scale), config.identify in ("every", "rescore")
    each = q.shape[2] // k.shape[2]
    shared: list[tuple[Tensor, Tensor]] = []
    for head in range(q.shape[2]):
        scores = scale * q[0, :, head].to(lse.dtype) @ k[0, slice(*group.candidates), head // each].to(lse.dtype).T
        own = (lse[0, head, :, None] - scores).amin(0).double().cpu()
        weights = (scores - torch.logaddexp(lse[0, head], scores.logsumexp(1))[:, None]).exp()
        found = torch.maximum(needed[head], own) if exact else needed[head], weights
        if config.share == "query":
            yield found
            continue
        shared.append(found)
        if len(shared) == each:
            union = torch.stack([one for one, _ in shared]).amin(0)
            yield from ((union, weights) for _, weights in shared)
            shared = []


def _from_finder(
    q: Tensor, k: Tensor, state: AnchorState, geometry: Geometry, group: Group, config: AnchorConfig, scale: float
) -> Tensor:
    """float64 (Hq, C): from which theta on a column is kept (means), or passes the first test (the bound of `rescore`)."""
    first = finder(q, k, state, geometry, replace(config, theta=0.0, last=0), scale)
    if isinstance(first, MeanFinder):
        return -first.margins(group, 0).double().cpu()
    needed = torch.full((q.shape[2], group.candidate_keys), -math.inf, dtype=torch.float64)
    if config.identify == "rescore":
        needed.fill_(math.inf)
        for theta in reversed(BOUNDS.tolist()):
            passed = finder(q, k, state, geometry, replace(config, theta=theta, last=0), scale).passed(group, 0)
            needed[passed.cpu()] = theta
            if not passed.any():
                break
    return needed

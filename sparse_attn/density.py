"""A theta for a density: what share of the candidates a few groups keep, and the theta at which all groups would keep enough.

    density(theta) = (anchor pairs + share(theta) * candidate pairs) / causal pairs

`share` is measured on a few groups of each run of rows, against the keys that its rank holds: nothing travels but the initial
block and one row of shares a rank. The estimate is off where a rank's own keys are unlike the others'; the density that came
about is in the call's statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparse_attn.anchor import pattern_based_anchor
from sparse_attn.config import AnchorConfig
from sparse_attn.cost import resolved
from sparse_attn.distributed.local import LocalGeometry
from sparse_attn.geometry import Geometry, Group, documents_of
from sparse_attn.identify import finder
from sparse_attn.kernels.choice import block_kernel
from sparse_attn.kernels.torch_kernel import TorchKernel
from tokenring import Layout, connect
from tokenring.transport import Transport

LOWEST, HIGHEST = -4.0, 16.0
ROUNDS = (11, 11, 11)
"""So many thetas are tried in all the range, then each time between the two whose shares enclose the wanted one."""
COLUMNS = 2048
"""Candidates of a group that are looked at, evenly spread."""
GROUPS = 3
"""Groups of a run of rows that are looked at, evenly spread."""


def theta_for_density(
    q: Tensor,
    k: Tensor,
    target: float,
    *,
    config: AnchorConfig | None = None,
    scale: float | None = None,
    group: Any = None,
    layout: Layout | None = None,
) -> float:
    """The theta at which about a share `target` of the causal pairs would be computed, the same on every rank. Collective.

    Args:
        q: (B, S, Hq, D), k: (B, S, Hkv, D): this rank's rows; all rows without a group. The first batch entry is looked at.
        target: computed pairs / causal pairs, anchor region included. Below what the anchor region alone takes: -infinity.
        config: everything but theta.
        layout: which rows each rank holds; contiguous where not given.

    Raises:
        ValueError: a target outside (0, 1], or rows that do not fit the layout.

    >>> q, k = torch.randn(1, 600, 2, 16), torch.randn(1, 600, 1, 16)
    >>> config = AnchorConfig(block=8, step=4, dense="never")
    >>> theta = theta_for_density(q, k, 0.4, config=config)
    >>> from sparse_attn import plan
    >>> abs(plan(q, k, config=replace(config, theta=theta)).density - 0.4) < 0.1
    True
    """
    if not 0 < target <= 1:
        raise ValueError(
            f"target is {target}; a density is computed pairs / causal pairs: give a number above 0, at most 1"
        )
    runtime, config = connect(group), AnchorConfig() if config is None else config
    layout = Layout.of("contiguous" if layout is None else layout, q.shape[1], runtime.world).at(0)
    if q.shape[1] != layout.length(runtime.rank) or k.shape[1] != q.shape[1]:
        raise ValueError(
            f"rank {runtime.rank} got {q.shape[1]} queries and {k.shape[1]} keys; its layout gives it "
            f"{layout.length(runtime.rank)} rows: give as many of both"
        )
    geometry = Geometry.of(documents_of(layout.total, layout.total, None, None), *resolved(config, layout.total))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    wanted = _wanted(target, geometry)
    if not 0 < wanted < 1:
        return math.inf if wanted > 0 else -math.inf
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        samples = list(_samples(q[:1], k[:1], geometry, layout, runtime))
        low, high = LOWEST, HIGHEST
        for count in ROUNDS:
            thetas = torch.linspace(low, high, count, dtype=torch.float64)
            mine = torch.zeros(count + 1, dtype=torch.float64)
            for rows, keys, window, candidates in samples:
                mine[:-1] += candidates * _shares(rows, keys, window, geometry, config, scale, thetas)
                mine[-1] += candidates
            told = torch.stack(runtime.all_gather(mine.to(q.device), control=True)).sum(0).cpu()
            reached = int((told[:-1] < wanted * told[-1]).sum())
            low, high = (float(thetas[min(max(at, 0), count - 1)]) for at in (reached - 1, reached))
    return high


def _wanted(target: float, geometry: Geometry) -> float:
    """The share of the candidates that a density leaves room for."""
    room = target * geometry.causal_pairs - geometry.anchor_pairs
    return room / geometry.candidate_pairs if geometry.candidate_pairs else math.inf


def _samples(
    q: Tensor, k: Tensor, geometry: Geometry, layout: Layout, runtime: Transport
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """For some groups of each run: their queries, the keys it is judged by (candidates thinned out), how many candidates
    there are."""
    rank, block, size = runtime.rank, geometry.initial, geometry.rows
    places = layout.positions(rank).to(k.device)
    order = places.argsort()
    near = order[places[order] < block]
    parts = runtime.all_gather(k[0, near].contiguous(), control=True)
    firsts = [layout.positions(r) for r in range(layout.world)]
    at = torch.cat([p[p < block].sort().values for p in firsts]).argsort().to(k.device)
    initial = torch.cat(parts)[at][None]
    row = 0
    for run in layout.segments(rank):
        for start, stop in _groups(run.start, run.start + run.count, size):
            candidates = start - geometry.window - block
            held = order[(places[order] >= block) & (places[order] < start - geometry.window)]
            if candidates > 0 and len(held):
                thinned = held[:: -(-len(held) // COLUMNS)]
                window = order[(places[order] >= max(block, start - geometry.window)) & (places[order] < start)]
                own = slice(row + start - run.start, row + stop - run.start)
                keys = torch.cat([initial, k[:, thinned], k[:, window], k[:, own]], 1)
                yield q[:, own], keys, len(window), candidates
        row += run.count


def _groups(first: int, last: int, size: int) -> list[tuple[int, int]]:
    """Some groups inside a run of positions, the last one among them; a run inside one group is that group."""
    cuts = [first, *range(first - first % size + size, last, size), last]
    groups = list(pairwise(cuts))
    whole = [g for g in groups if g[1] - g[0] == size] or groups
    return [whole[(i + 1) * len(whole) // GROUPS - 1] for i in range(GROUPS) if (i + 1) * len(whole) // GROUPS]


def _shares(
    q: Tensor, k: Tensor, window: int, geometry: Geometry, config: AnchorConfig, scale: float, thetas: Tensor
) -> Tensor:
    """float64 (thetas): the share of its candidates that a group keeps, mean over heads; k ends with window and own rows."""
    rows, keys, block = q.shape[1], k.shape[1], geometry.initial
    edge = keys - rows - window
    near = ((0, block), (edge, edge + window)) if window else ((0, block),)
    group = Group((0, rows), keys - rows, near, (block, edge), 0)
    local = LocalGeometry((((0, rows), (0, keys)),), geometry.block, geometry.step, block, window, (group,))
    kernel = TorchKernel(block_kernel("auto"), q, k, scale)
    state = pattern_based_anchor(kernel, q, k, k, local)
    shares = []
    for theta in thetas.tolist():
        kept = finder(q, k, state, local, replace(config, theta=theta), scale).kept(group, 0)
        shares.append(kept.double().mean())
    return torch.stack(shares).cpu()

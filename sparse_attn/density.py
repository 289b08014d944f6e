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
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sparse_attn.anchor import pattern_based_anchor
from sparse_attn.arguments import check, configuration
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
    kv_layout: Layout | None = None,
) -> float:
    """The theta at which about a share `target` of the causal pairs would be computed, the same on every rank. Collective.

    Args:
        q: (B, Sq, Hq, D), k: (B, Sk, Hkv, D): this rank's rows; all rows without a group. Queries are the last rows of their
            sequence. The first batch entry is looked at.
        target: computed pairs / causal pairs, anchor region included. Below what the anchor region alone takes: -infinity.
        config: everything but theta.
        layout, kv_layout: which rows each rank holds; contiguous where not given. kv_layout where keys are cut differently:
            rows on top of a cache, each on the rank that holds its key.

    Raises:
        ValueError: a target outside (0, 1], or rows that do not fit the layouts.

    >>> q, k = torch.randn(1, 600, 2, 16), torch.randn(1, 600, 1, 16)
    >>> config = AnchorConfig(block=8, step=4, dense="never")
    >>> theta = theta_for_density(q, k, 0.4, config=config)
    >>> from sparse_attn import plan
    >>> abs(plan(q, k, config=replace(config, theta=theta)).density - 0.4) < 0.1
    True
    """
    if not (isinstance(target, Real) and 0 < target <= 1):
        raise ValueError(
            f"target is {target!r}; a density is computed pairs / causal pairs: give a number above 0, at most 1"
        )
    check(q, k, k, scale, spread=True)
    if not len(q):
        raise ValueError("q and k hold no batch entry; the first one is looked at, so give one or more")
    runtime, config = connect(group), configuration(config)
    rows, keys = _layouts(q, k, layout, kv_layout, runtime)
    geometry = Geometry.of(documents_of(rows.total, keys.total, None, None), *resolved(config, keys.total))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    wanted = _wanted(target, geometry)
    if not 0 < wanted < 1:
        return math.inf if wanted > 0 else -math.inf
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        samples = list(_samples(q[:1], k[:1], geometry, (rows, keys), runtime))
        low, high = LOWEST, HIGHEST
        for count in ROUNDS:
            thetas = torch.linspace(low, high, count, dtype=torch.float64)
            mine = torch.zeros(count + 1, dtype=torch.float64)
            for own, near, window, candidates in samples:
                mine[:-1] += candidates * _shares(own, near, window, geometry, config, scale, thetas)
                mine[-1] += candidates
            told = torch.stack(runtime.all_gather(mine.to(q.device), control=True)).sum(0).cpu()
            reached = int((told[:-1] < wanted * told[-1]).sum())
            low, high = (float(thetas[min(max(at, 0), count - 1)]) for at in (reached - 1, reached))
    return high


def _layouts(
    q: Tensor, k: Tensor, layout: Layout | None, kv_layout: Layout | None, runtime: Transport
) -> tuple[Layout, Layout]:
    """Layouts of queries and keys, by the positions of the keys' sequence, which count from 0."""
    rank, world = runtime.rank, runtime.world
    rows = Layout.of("contiguous" if layout is None else layout, q.shape[1], world).at(0)
    keys = Layout.contiguous(k.shape[1] * world, world) if layout is None else rows
    keys = keys if kv_layout is None else kv_layout.at(0)
    rows = rows.at(max(0, keys.total - rows.total))
    if q.shape[1] != rows.length(rank) or k.shape[1] != keys.length(rank) or rows.total > keys.total:
        raise ValueError(
            f"rank {rank} got {q.shape[1]} queries and {k.shape[1]} keys; its layouts give it {rows.length(rank)} of "
            f"{rows.total} queries and {keys.length(rank)} of {keys.total} keys: queries are the last rows, each on the rank "
            "that holds its key"
        )
    if not torch.isin(rows.positions(rank), keys.positions(rank)).all():
        raise ValueError(
            f"rank {rank} holds queries whose keys lie on other ranks; append to the cache what is attended to"
        )
    return rows, keys


def _wanted(target: float, geometry: Geometry) -> float:
    """The share of the candidates that a density leaves room for."""
    room = target * geometry.causal_pairs - geometry.anchor_pairs
    return room / geometry.candidate_pairs if geometry.candidate_pairs else math.inf


def _samples(
    q: Tensor, k: Tensor, geometry: Geometry, layouts: tuple[Layout, Layout], runtime: Transport
) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """For some groups of each run: their queries, the keys they are judged by (candidates thinned out), how many of these
    are window, how many candidates there are."""
    (rows, cut), rank, block, size = layouts, runtime.rank, geometry.initial, geometry.rows
    places = cut.positions(rank).to(k.device)
    order = places.argsort()

    def held(start: int, stop: int) -> Tensor:
        return order[(places[order] >= start) & (places[order] < stop)]

    parts = runtime.all_gather(k[0, held(0, block)].contiguous(), control=True)
    firsts = [cut.positions(r) for r in range(cut.world)]
    at = torch.cat([p[p < block].sort().values for p in firsts]).argsort().to(k.device)
    initial = torch.cat(parts)[at][None]
    row = 0
    for run in rows.segments(rank):
        for start, stop in _groups(run.start, run.start + run.count, size):
            edge = start - geometry.window
            far = held(block, edge)
            if edge > block and len(far):
                thinned = far[:: -(-len(far) // COLUMNS)]
                window = held(max(block, edge), start)
                own = slice(row + start - run.start, row + stop - run.start)
                keys = torch.cat([initial, k[:, thinned], k[:, window], k[:, held(start, stop)]], 1)
                yield q[:, own], keys, len(window), edge - block
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
        kept = finder(q, k, state, local, replace(config, theta=theta, last=0), scale).kept(group, 0)
        shares.append(kept.double().mean())
    return torch.stack(shares).cpu()

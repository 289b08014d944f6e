"""Phase 1 on plain matrix products, a piece at a time that stays in a core's cache.

As quick as torch's flash operator for CPUs on regions so short, quicker where query heads share keys, and it knows each row's
largest score, the paper's anchor, which the operator keeps to itself:

    S = scale * q k^T over the region's keys up to the piece's last row
    top = max S,    P = exp(S - top),    l = sum P,    out = P v / l,    lse = top + log l

Scores are in base 2 until the end: torch takes 2^x three times as fast as e^x. Where the largest scores of a piece are moderate
nothing is subtracted from it, which saves a pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparse_attn.folding import alike
from sparse_attn.geometry import Geometry, Group
from sparse_attn.kernels.state import AnchorState

CACHED = 1 << 18
"""Most scores of a piece and thread: a second-level cache of 1 MiB holds them, save in the longest groups."""
LOG2_E = math.log2(math.e)
MODERATE = 48.0
"""Largest scores and log-sum-exps up to this, in base 2 and either way, need no shift: float32 has as much room again on both sides."""
ROWS = 64, 128
"""Fewest and most rows of a piece: short ones multiply slower, long ones read more keys past the diagonal."""


def takes(q: Tensor) -> bool:
    """Whether this is a way for the tensors: in 16 bits scores would be rounded before their softmax."""
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)


def anchor_region(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, scale: float) -> AnchorState:
    """State of every row after initial block, window and own group; arguments as for `Kernel.anchor`.

    As many key heads go side by side as there are threads, and groups alike where heads are fewer or pieces small.
    """
    state, threads, kv_heads = AnchorState.unfilled(q, v.shape[3]), torch.get_num_threads(), k.shape[2]
    memory, each = _Memory(q, k, v), q.shape[2] // kv_heads
    for groups in alike(geometry, q.shape[1]):
        piece = min(ROWS[1], groups[0].count) * each * (groups[0].prefix_keys + groups[0].count)
        at_once = max(1, threads // kv_heads) * max(1, CACHED // max(1, piece))
        rows = slice(groups[0].rows[0], groups[-1].rows[1])
        for entry in range(q.shape[0]):
            ours = [_by_head(x[entry, rows], len(groups), kv_heads) for x in (q, state.out)]
            ours += [_by_head(x[entry, :, rows].T.unsqueeze(2), len(groups), kv_heads).squeeze(4) for x in state[1:]]
            for first in range(0, len(groups), at_once):
                some = slice(first, first + at_once)
                for head in range(0, kv_heads, threads):
                    heads = slice(head, head + threads)
                    region = memory.region(entry, heads, groups[some])
                    _attend(memory, scale, *region, *(x[some, heads] for x in ours))
    return state


def _by_head(x: Tensor, groups: int, kv_heads: int) -> Tensor:
    """(groups * rows, Hq, D) -> (groups, Hkv, Hq / Hkv, rows, D), a view."""
    return x.unflatten(1, (kv_heads, -1)).unflatten(0, (groups, -1)).permute(0, 2, 3, 1, 4)


def _attend(
    memory: _Memory, scale: float, keys: Tensor, values: Tensor, q: Tensor, out: Tensor, lse: Tensor, top: Tensor
) -> None:
    """Rows (groups, heads, each, rows, D) against their region; out, lse and top of the same rows are filled."""
    each, count = q.shape[2:4]
    across, before = keys.mT, keys.shape[1] - count
    for rows in _pieces(count, before, each):
        width = before + rows.stop
        scores, by_row, corner = memory.scratch(q.shape[:3], rows, width)
        mine = q[:, :, :, rows].reshape(len(keys), scores.shape[1], -1)
        torch.baddbmm(scores, mine, across[:, :, :width], beta=0, alpha=scale * LOG2_E, out=scores)
        corner += memory.later(corner.shape[-1])
        highest = by_row.amax(-1)
        shifted = float(highest.abs().amax()) > MODERATE
        total = (by_row.sub_(highest.unsqueeze(4)) if shifted else by_row).exp2_().sum(-1)
        found = torch.bmm(scores, values[:, :width]).view(*by_row.shape[:4], -1)
        torch.div(found, total.unsqueeze(4), out=out[:, :, :, rows])
        top[..., rows], lse[..., rows] = highest, total.log2_().add_(highest) if shifted else total.log2_()
    top /= LOG2_E
    lse /= LOG2_E


def _pieces(count: int, before: int, each: int) -> Iterator[slice]:
    """Runs of a group's rows whose scores fit the cache."""
    first = 0
    while first < count:
        fitting = CACHED // (each * (before + first + ROWS[0])) // ROWS[0] * ROWS[0]
        last = min(count, first + min(max(ROWS[0] // each, fitting), max(ROWS[0] // each, ROWS[1])))
        yield slice(first, last)
        first = last


class _Memory:
    """What one piece and one region leave to the next: fresh memory costs page faults, fresh views a third of a piece's calls."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.sources, self.regions = (k, v), [x.new_empty(0) for x in (k, v)]
        self.scores = q.new_empty(0)
        self.views: dict[tuple[int, ...], tuple] = {}
        self.masks: dict[int, Tensor] = {}

    def region(self, entry: int, heads: slice, groups: Sequence[Group]) -> tuple[Tensor, ...]:
        """Keys and values (groups * heads, n, D or Dv): the prefixes of groups alike, each before the group's own rows."""
        return tuple(self._region(number, x[entry, :, heads], groups) for number, x in enumerate(self.sources))

    def _region(self, number: int, x: Tensor, groups: Sequence[Group]) -> Tensor:
        shape = len(groups), x.shape[1], groups[0].prefix_keys + groups[0].count, x.shape[2]
        size = shape[0] * shape[1] * shape[2] * shape[3]
        if self.regions[number].numel() < size:
            self.regions[number] = x.new_empty(size)
        held = self.regions[number][:size].view(shape)
        for place, group in enumerate(groups):
            at = 0
            for a, b in (*group.prefix, (group.diagonal, group.diagonal + group.count)):
                held[place, :, at : at + b - a] = x[a:b].transpose(0, 1)
                at += b - a
        return held.flatten(0, 1)

    def scratch(self, heads: Sequence[int], rows: slice, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of a piece (heads, each * rows, width), the same by row, and their last square."""
        height = rows.stop - rows.start
        known = *heads, height, width
        if known not in self.views:
            size = math.prod(known)
            if self.scores.numel() < size:
                self.scores, self.views = self.scores.new_empty(size), {}
            by_row = self.scores[:size].view(known)
            self.views[known] = by_row.view(heads[0] * heads[1], -1, width), by_row, by_row[..., width - height :]
        return self.views[known]

    def later(self, rows: int) -> Tensor:
        """(rows, rows): 0 up to the diagonal and -inf past it."""
        if rows not in self.masks:
            self.masks[rows] = self.scores.new_full((rows, rows), -torch.inf).triu(1)
        return self.masks[rows]

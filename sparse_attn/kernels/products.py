"""Phase 1 on plain matrix products, a piece at a time that stays in a core's cache.

As quick as torch's flash operator for CPUs on regions so short, and it knows each row's largest score, the paper's anchor, which
the operator keeps to itself:

    S = scale * q k^T over the region's keys up to the piece's last row
    top = max S,    P = softmax S,    out = P v,    lse = top - log max P        the largest weight is exp(0) / sum
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparse_attn.folding import alike, prefixes
from sparse_attn.geometry import Geometry, Group
from sparse_attn.kernels.state import AnchorState

CACHED = 1 << 18
"""Most scores of a piece and thread: a second-level cache of 1 MiB holds them, save in the longest groups."""
ROWS = 64, 128
"""Fewest and most rows of a piece: short ones multiply slower, long ones read more keys past the diagonal."""


def takes(q: Tensor) -> bool:
    """Whether this is a way for the tensors: in 16 bits scores would be rounded before their softmax."""
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)


def anchor_region(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, scale: float) -> AnchorState:
    """State of every row after initial block, window and own group; arguments as for `Kernel.anchor`.

    As many key heads go side by side as there are threads, and groups alike where heads are fewer.
    """
    state, threads, kv_heads = AnchorState.unfilled(q, v.shape[3]), torch.get_num_threads(), k.shape[2]
    scratch = _Scratch(q)
    for groups in alike(geometry, geometry.rows * max(1, threads // kv_heads)):
        rows, count = slice(groups[0].rows[0], groups[-1].rows[1]), len(groups)
        for entry in range(q.shape[0]):
            ours = [_by_head(x[entry, rows], count, kv_heads) for x in (q, state.out)]
            ours += [_by_head(x[entry, :, rows].T.unsqueeze(2), count, kv_heads).squeeze(4) for x in state[1:]]
            for first in range(0, kv_heads, threads):
                heads = slice(first, first + threads)
                keys, values = (_region(x[entry : entry + 1, :, heads], groups) for x in (k, v))
                mine, *targets = (x[:, heads] for x in ours)
                _attend(scratch, scale, mine, keys, values, *targets)
    return state


def _by_head(x: Tensor, groups: int, kv_heads: int) -> Tensor:
    """(groups * rows, Hq, D) -> (groups, Hkv, Hq / Hkv, rows, D), a view."""
    return x.unflatten(1, (kv_heads, -1)).unflatten(0, (groups, -1)).permute(0, 2, 3, 1, 4)


def _region(x: Tensor, groups: Sequence[Group]) -> Tensor:
    """(groups * heads, keys, D): the prefixes of groups alike, each before the group's own keys."""
    own = x[0, groups[0].diagonal : groups[-1].diagonal + groups[-1].count].unflatten(0, (len(groups), -1))
    before = prefixes(x, groups) if groups[0].prefix else own[:, :0]
    both = x.new_empty(len(groups), x.shape[2], before.shape[1] + own.shape[1], x.shape[3])
    both[:, :, : before.shape[1]] = before.transpose(1, 2)
    both[:, :, before.shape[1] :] = own.transpose(1, 2)
    return both.flatten(0, 1)


def _attend(
    scratch: _Scratch, scale: float, q: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, top: Tensor
) -> None:
    """Rows (groups, heads, each, rows, D) against their region; out, lse and top of the same rows are filled."""
    each, count = q.shape[2:4]
    across, before = keys.mT, keys.shape[1] - count
    least = torch.empty_like(top, memory_format=torch.contiguous_format)
    for rows in _pieces(count, before, each):
        height, width = rows.stop - rows.start, before + rows.stop
        mine = q[:, :, :, rows].reshape(len(keys), each * height, -1)
        scores, weights = scratch.pair(len(keys), each * height, width)
        torch.baddbmm(scores, mine, across[:, :, :width], beta=0, alpha=scale, out=scores)
        scores.unflatten(1, (each, height))[..., width - height :] += scratch.later(height)
        torch.softmax(scores, -1, out=weights)
        found, shape = torch.bmm(weights, values[:, :width]), (*q.shape[:3], height)
        out[:, :, :, rows] = found.view(*shape, -1)
        top[..., rows] = scores.amax(-1).view(shape)
        least[..., rows] = weights.amax(-1).view(shape)
    torch.sub(top, least.log_(), out=lse)


def _pieces(count: int, before: int, each: int) -> Iterator[slice]:
    """Runs of a group's rows whose scores fit the cache."""
    first = 0
    while first < count:
        fitting = CACHED // (each * (before + first + ROWS[0])) // ROWS[0] * ROWS[0]
        last = min(count, first + min(max(ROWS[0] // each, fitting), max(ROWS[0] // each, ROWS[1])))
        yield slice(first, last)
        first = last


class _Scratch:
    """Scores and weights of one piece, kept for the next."""

    def __init__(self, like: Tensor) -> None:
        self.both = like.new_empty(0)
        self.masks: dict[int, Tensor] = {}

    def pair(self, *shape: int) -> tuple[Tensor, Tensor]:
        size = shape[0] * shape[1] * shape[2]
        if self.both.numel() < 2 * size:
            self.both = self.both.new_empty(2 * size)
        return self.both[:size].view(shape), self.both[size : 2 * size].view(shape)

    def later(self, rows: int) -> Tensor:
        """(rows, rows): 0 up to the diagonal and -inf past it."""
        if rows not in self.masks:
            self.masks[rows] = self.both.new_full((rows, rows), -torch.inf).triu(1)
        return self.masks[rows]

"""VFlowOpt stage 1: importance by the attention of global tokens and by entropy; the least important are recycled.

    global tokens   received attention > t x its mean
    importance      mean attention row of the global tokens + alpha_v softmax(entropy of the patch)
    recycling       the least important tokens join, cell by cell of m x m tokens, by importance-weighted mean,
                    at the cell's most important one

Source: VFlowOpt, "A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization" (ICCV 2025), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.exact import rest, top
from token_reduction.options import COUNT, Limits, Range
from token_reduction.tokens import TokenShard
from token_reduction.unit_reducer import UnitReducer

_BINS = 256


@dataclass(frozen=True, kw_only=True)
class VFlowOpt(UnitReducer):
    """Keep k rows of each frame. Needs the encoder layer's `queries` and `keys`: attention is made frame by frame.

    Args:
        heads: heads that lie side by side in queries and keys; None: as the channels tell, (N, H, d), or one.
        t: how far above the mean a global token receives attention; none above: all tokens are global.
        m: side of a recycling cell in tokens, rounded to whole ones.
        alpha_v: weight of the entropy, which then needs `pixels` in 0..1; the values shipped for 10, 25 and 50% have 0.
        recycle: whether the least important tokens join. None: always, but for "released" in items of one frame only, as the
            released code plainly takes the k most important tokens of each frame of a video.

    Scores: importance.
    """

    heads: int | None = None
    t: float = 2.0
    m: float = 12.0
    alpha_v: float = 0.0
    recycle: bool | None = None
    limits: ClassVar[Limits] = {"heads": COUNT, "t": Range(0), "m": COUNT}
    name: ClassVar[str] = "vflowopt"
    cost: ClassVar[str] = "O(T N^2 D)"
    source: ClassVar[str] = "VFlowOpt, stage 1"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "authors'"
    scope: ClassVar[str] = "frame"

    @property
    def idle(self) -> dict[str, str]:
        return {"m": "recycle=False"} if self.recycle is False else {}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"queries", "keys"} | ({"pixels"} if self.alpha_v else set()))

    def problem(self, shard: TokenShard, counts: Sequence[int]) -> str | None:
        return super().problem(shard, counts) or self._heads(shard)

    def _heads(self, shard: TokenShard) -> str | None:
        queries, keys = (shard.channels[name].shape for name in ("queries", "keys"))
        width = queries[1:].numel()
        if queries != keys or len(queries) not in (2, 3) or width % (self.heads or 1):
            return (
                f"vflowopt needs queries and keys alike, (N, H, d), or (N, C) with C a multiple of {self.heads or 1} heads, got "
                f"{tuple(queries)}, {tuple(keys)}"
            )
        return None

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        score, recycles = self.importance(batch), self.recycle
        always = self.variant != "released" if recycles is None else recycles
        single = [frames == 1 and recycles is None for frames in batch.frames]
        plain = top(score, count).sort(-1).values
        answers = zip(plain, score, single)
        return [self.cells(s, batch.grid, count) if always or one else Selection(k, scores=s) for k, s, one in answers]

    def cells(self, score: Tensor, grid: tuple[int, int, int], count: int) -> Selection:
        """One unit's answer where the least important tokens join: score (n,)."""
        _, h, w = grid
        side = max(1, round(self.m))
        cell = torch.arange(h, device=score.device)[:, None] // side * (-(-w // side))
        cell = (cell + torch.arange(w, device=score.device) // side).flatten()
        kept = top(score, max(0, count - int(cell.max()) - 1))
        # A cell whose tokens all stay leaves its row free: the best of the others take it, which may empty further cells.
        while len(kept) + len(cell[rest(len(score), kept)].unique()) < count:
            others = rest(len(score), kept)
            spare = count - len(kept) - len(cell[others].unique())
            kept = torch.cat([kept, others[top(score[others], spare)]])
        others = rest(len(score), kept)
        if len(kept) + len(cell[others].unique()) != count:
            return Selection(top(score, count).sort().values, scores=score)
        return self.joined(kept, others, cell, score)

    def importance(self, batch: Batch) -> Tensor:
        """(B, n) float64."""
        q, k = (batch.channels[name].double() for name in ("queries", "keys"))
        heads = self.heads or (q.shape[2] if q.dim() == 4 else 1)
        q, k = (part.reshape(*part.shape[:2], heads, -1) for part in (q, k))
        attention = q.new_zeros(q.shape[0], q.shape[1], q.shape[1])
        for head in range(heads):  # one map at a time, however many heads
            attention += torch.softmax(q[:, :, head] @ k[:, :, head].mT / q.shape[-1] ** 0.5, -1)
        attention /= heads
        received = attention.mean(1)
        global_ = received > self.t * received.mean(1, keepdim=True)
        global_ |= ~global_.any(1, keepdim=True)
        score = (attention * global_[..., None]).sum(1) / global_.sum(1, keepdim=True)
        if not self.alpha_v:
            return score
        entropy = torch.stack([_entropy(pixels) for pixels in batch.channels["pixels"]])
        return score + self.alpha_v * torch.softmax(entropy, 1)

    @staticmethod
    def joined(kept: Tensor, others: Tensor, cell: Tensor, score: Tensor) -> Selection:
        """Kept tokens as they are, the others one row per cell."""
        cells, which = cell[others].unique(return_inverse=True)
        best = torch.stack([others[which == c][score[others[which == c]].argmax()] for c in range(len(cells))])
        anchors = torch.cat([kept, best])
        order = anchors.argsort()
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        total = torch.zeros(len(cells), dtype=score.dtype, device=score.device).index_add_(0, which, score[others])
        weight = torch.cat([torch.ones_like(score[kept]), score[others] / total[which]])
        row = torch.cat([place[: len(kept)], place[len(kept) + which]])
        return Selection.merge(anchors[order], row, torch.cat([kept, others]), weight, score)


def _entropy(pixels: Tensor) -> Tensor:
    """(n,) bits of a 256-bin histogram of each token's pixels; a last dim of 3 is averaged to grey."""
    grey = pixels.double().mean(-1) if pixels.shape[-1] == 3 and pixels.dim() > 2 else pixels.double()
    level = (grey.flatten(1) * (_BINS - 1)).round().clamp(0, _BINS - 1).long()
    counts = torch.zeros(len(level), _BINS, dtype=torch.float64, device=pixels.device)
    p = counts.scatter_add_(1, level, torch.ones_like(level, dtype=torch.float64)) / level.shape[1]
    return -(p * p.clamp_min(1e-300).log2()).sum(1)

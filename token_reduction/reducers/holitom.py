"""HoliTom's outer stage: cut a video so that as many still cells as possible fall away, then merge in space.

    still(c, segment)   cosine of cell c with itself one frame on is above tau throughout the segment
    cuts                maximise sum over segments of (length - 1) x still cells            (dynamic programme)
    a still cell's tokens become one, at the segment's first frame; of what is left, half by [CLS] attention,
    half as density-peak clusters

Source: HoliTom, "Holistic Token Merging for Fast Video Large Language Models" (NeurIPS 2025), sections 3.2 and 3.3. Its stage
in the model is a layer policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.budget import apportion
from token_reduction.exact import rest, rows_at, top
from token_reduction.options import COSINE, COUNT, SHARE, Limits
from token_reduction.rows import at_once
from token_reduction.selectors.cluster import density_peaks, join_nearest, scaled_rows
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class HoliTom(UnitReducer):
    """Keep exactly k rows of each video.

    Args:
        tau: cosine above which a cell stands still. longest: most frames of a segment.
        merged: share of a frame's rows that are clusters. neighbours: nearest rows that make a density.

    Where fewer tokens than k are left after the still ones joined, the still ones that moved most stay apart. Scores: [CLS]
    attention. Variants: one algorithm; best, paper and released are the same.
    """

    tau: float = 0.65
    longest: int = 32
    merged: float = 0.5
    neighbours: int = 7
    limits: ClassVar[Limits] = {"tau": COSINE, "longest": COUNT, "merged": SHARE, "neighbours": COUNT}
    name: ClassVar[str] = "holitom"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attn"})
    cost: ClassVar[str] = "O(n (D + s) + T N^2 D), s frames of the longest segment"
    source: ClassVar[str] = "HoliTom, outer-model merging"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "authors'"

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        t, h, w = batch.grid
        n, attention = h * w, batch.attention()
        group = self.still(batch.units().unflatten(1, (t, n)), count)
        anchors = [own.unique() for own in group]
        final = torch.full_like(group, -1)
        alike: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        for unit, own in enumerate(anchors):
            sizes = torch.bincount(own // n, minlength=t).tolist()
            shares = apportion(count, [float(size) for size in sizes], sizes)
            for tokens, share in zip(own.split(sizes), shares):
                if share:
                    alike.setdefault((len(tokens), share), []).append((unit, tokens))
        for (length, share), frames in alike.items():
            size = at_once(length, batch.x.shape[2], group.device)
            for part in (frames[i : i + size] for i in range(0, len(frames), size)):
                unit = torch.tensor([u for u, _ in part], device=group.device)[:, None]
                tokens = torch.stack([own for _, own in part])
                chosen, place = self.frames(batch.x[unit, tokens], attention[unit, tokens], share)
                final[unit, tokens] = torch.where(
                    place >= 0, tokens.gather(1, chosen).gather(1, place.clamp_min(0)), -1
                )
        return [self.answer(*unit) for unit in zip(final, group, attention)]

    @staticmethod
    def answer(final: Tensor, group: Tensor, attention: Tensor) -> Selection:
        """A unit's answer: `final` (n,) the kept token of each anchor, -1 for none; group (n,) the anchor of each token."""
        kept, member = final[final >= 0].unique(), final[group]
        row = torch.where(member >= 0, torch.searchsorted(kept, member.clamp_min(0)), -1)
        return Selection.groups(kept, row, attention)

    def still(self, q: Tensor, count: int) -> Tensor:
        """(B, T N) the anchor of each token of frames q (B, T, N, D) after still cells joined in time; `count` at least."""
        b, t, n, _ = q.shape
        alike = torch.stack([(q[:, f] * q[:, f - 1]).sum(-1) for f in range(1, t)] or [q.new_zeros(b, n)], 1)[
            :, : t - 1
        ]
        quiet, token = alike > self.tau, torch.arange(t * n, device=q.device).view(t, n)
        anchor = token.expand(b, t, n).clone()
        for unit, cuts in enumerate(self.cuts(quiet, t)):
            for first, last in cuts:
                if last - first > 1:
                    stays = quiet[unit, first : last - 1].all(0)
                    anchor[unit, first:last] = torch.where(stays, token[first], anchor[unit, first:last])
        for unit, joined in enumerate((anchor != token).unbind()):
            frame, cell = joined.nonzero(as_tuple=True)
            missing = count - (t * n - len(frame))
            if missing > 0:
                apart = top(1 - alike[unit, frame - 1, cell], missing)
                anchor[unit, frame[apart], cell[apart]] = token[frame[apart], cell[apart]]
        return anchor.flatten(1)

    def cuts(self, quiet: Tensor, frames: int) -> list[list[tuple[int, int]]]:
        """Of each unit the segments (first, last) with the most saved tokens; quiet: (B, T - 1, N) bool. Ties go to the longer
        last segment."""
        longest, together, cells = min(self.longest, frames), quiet, []
        for length in range(
            2, longest + 1
        ):  # (B, frames - length + 1): cells that stand still from each first frame on
            cells.append(together.sum(2).tolist())
            together = together[:, :-1] & quiet[:, length - 1 :]
        return [self.plan([unit[own] for unit in cells], frames) for own in range(len(quiet))]

    def plan(self, cells: list[list[int]], frames: int) -> list[tuple[int, int]]:
        """The segments of one unit; cells[l - 2][f]: still cells of the segment of l frames from f on."""
        best, back = [0] * (frames + 1), [0] * (frames + 1)
        for last in range(1, frames + 1):
            lengths = range(1, min(self.longest, last) + 1)
            saved = [(best[last - n] + (cells[n - 2][last - n] * (n - 1) if n > 1 else 0), n) for n in lengths]
            best[last], length = max(saved)
            back[last] = last - length
        edges = [frames]
        while edges[-1]:
            edges.append(back[edges[-1]])
        edges.reverse()
        return list(pairwise(edges))

    def frames(self, x: Tensor, attention: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Of the tokens of frames x (F, m, D), attention (F, m): which stay (F, count), ascending, and each token's place among
        them, -1 for none (F, m)."""
        m = x.shape[1]
        first = top(attention, count - min(count - 1, round(self.merged * count)))
        place = torch.full_like(attention, -1, dtype=torch.int64)
        if first.shape[1] == count:
            kept = first.sort(1).values
            return kept, place.scatter_(1, kept, torch.arange(count, device=x.device).expand_as(kept))
        others = rest(m, first)
        rows = scaled_rows(rows_at(x, others))
        centres = top(density_peaks(rows, self.neighbours), count - first.shape[1]).sort(1).values
        merged = others.gather(1, centres)
        kept = torch.cat([first, merged], 1).sort(1).values
        place.scatter_(1, first, torch.searchsorted(kept, first.contiguous()))
        place.scatter_(1, others, torch.searchsorted(kept, merged).gather(1, join_nearest(rows, centres)))
        return kept, place

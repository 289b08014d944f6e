"""VidCom2: more tokens for frames that stand out, and in each frame the tokens that stand out.

    u(x, c) = sum over a in 2^-3 .. 2^1 of exp(-|x - c|^2 / 2a)            near 1 each: like the centre
    frame share  ~ 1 + p - mean p,  p = softmax(-mean_frame u(x, video centre) / 0.01)
    keep the smallest u(x, video centre) + u(x, frame centre) of each frame

Features: the half of the channels with the least variance, in unit rows.
Source: VidCom2, "Video Compression Commander: Plug-and-Play Inference Acceleration for Video LLMs" (EMNLP 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.budget import apportion
from token_reduction.exact import best_of_each, fixed_mean, marked, top
from token_reduction.options import POSITIVE, Limits
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class VidCom2(UnitReducer):
    """Keep exactly k tokens of each video, shared over frames by how much each stands out (at least 1 each where k allows).

    Args:
        temperature: of the frame shares.

    Scores: minus the summed likeness. Variants: one algorithm; best, paper and released are the same.
    """

    temperature: float = 0.01
    limits: ClassVar[Limits] = {"temperature": POSITIVE}
    name: ClassVar[str] = "vidcom2"
    cost: ClassVar[str] = "O(n D)"
    source: ClassVar[str] = "VidCom2"
    form: ClassVar[str] = "authors'"

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        t, h, w = batch.grid
        x = batch.x.double()
        calm = top(-x.var(1, unbiased=False), max(1, x.shape[2] // 2)).sort(-1).values
        x = torch.nn.functional.normalize(x.gather(2, calm[:, None].expand(-1, x.shape[1], -1)), dim=-1)
        video_centre, x = fixed_mean(x)[:, None, None], x.unflatten(1, (t, h * w))
        video = _likeness(x, video_centre)
        score = -(video + (video if t == 1 else _likeness(x, fixed_mean(x)[:, :, None])))
        p = torch.softmax(-video.mean(2) / self.temperature, 1)
        wanted = (1 + p - p.mean(1, keepdim=True)).tolist()
        shares = [_none_empty(apportion(count, frames, [h * w] * t)) for frames in wanted]
        kept = marked(best_of_each(score, torch.tensor(shares)).flatten(1))
        return [Selection(k, scores=s.flatten()) for k, s in zip(kept, score)]


def _none_empty(shares: list[int]) -> list[int]:
    """At least 1 each where there are enough: frames with most give, the first of equals first.

    >>> _none_empty([3, 0, 1]), _none_empty([1, 0])
    ([2, 1, 1], [1, 0])
    """
    for empty in [frame for frame, share in enumerate(shares) if share == 0]:
        most = max(range(len(shares)), key=lambda frame: (shares[frame], -frame))
        if shares[most] > 1:
            shares[most], shares[empty] = shares[most] - 1, 1
    return shares


def _likeness(x: Tensor, centre: Tensor) -> Tensor:
    squared = ((x - centre) ** 2).sum(-1)
    return sum(torch.exp(-squared / (2 * 2.0**power)) for power in range(-3, 2))

"""From video frames to the visual tokens that stay: read, encode, reduce, a window at a time.

    frames   0 ........ 15 | 16 ........ 31 | 32 .... 40      windows: cut by the frame numbers alone
    long     rank 0        | rank 1         | rank 2          a rank for each window, or several windows for each rank
    short    0 | 1 | 2     | 0 | 1 | 2      | 0 | 1 | 2       fewer windows than ranks: all ranks share each window

A rank holds the features of one window at the most, so memory is flat in the length of the video. Which tokens stay depends
on the windows and not on the ranks: `reduce_distributed` equals `reduce` bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.models.base import Adapter, VisualPlan
from launch.records import pack_image
from launch.stages import Stages
from launch.video import FramePlan, read
from token_reduction import Budget, Reducer, Reduction, VisualTokens, reduce_distributed, split_budget, windows

ENCODE_FRAMES = 4
"""Frames decoded and encoded at a time."""

SAMPLES = 6
"""Frames of the video that are kept as small pictures for the report."""


@dataclass(frozen=True)
class Windows:
    """How the video is cut: windows of whole frame groups, and the tokens each of them keeps."""

    frames: tuple[tuple[int, int], ...]
    budgets: tuple[Budget, ...]
    counts: tuple[int, ...]

    @classmethod
    def cut(cls, plan: VisualPlan, window: int, method: Reducer, budget: Budget) -> Windows:
        """Windows of `window` frames, rounded up to whole groups; each keeps one token or more.

        Raises:
            ValueError: the budget is below one token for the whole video, or cannot give one to each window.
        """
        if budget.kind == "ratio" and budget.value * plan.tokens < 1:
            share = f"{budget.value:g} of the video's {plan.tokens} visual tokens"
            raise ValueError(f"a budget of {share} is below one token; give {1 / plan.tokens:.2g} or more, or a count")
        size = -(-window // plan.frames_per_group) * plan.frames_per_group
        frames = windows(plan.frames, size)
        grids = [(-(-(last - first) // plan.frames_per_group), *plan.grid[1:]) for first, last in frames]
        budgets = split_budget(budget, [t * h * w for t, h, w in grids])
        counts = [method.count([grid], part)[0] for grid, part in zip(grids, budgets)]
        return cls(tuple(frames), tuple(budgets), tuple(counts))


@dataclass(frozen=True)
class Job:
    """Frames first..last-1 of one window, which this rank reads and encodes; `shared` with the other ranks, or alone."""

    window: int
    first: int
    last: int
    shared: bool


@dataclass
class Kept:
    """This rank's visual tokens that stay: rows (n, hidden), their numbers in the whole video, planes where there are any."""

    x: Tensor
    index: Tensor
    planes: Tensor | None
    samples: list[dict[str, Any]] = field(default_factory=list)


def jobs(cut: Windows, group_size: int, rank: int, world: int) -> list[Job]:
    """What one rank does, in order.

    >>> cut = Windows(((0, 4), (4, 8), (8, 9)), (), ())
    >>> [(j.window, j.first, j.last) for j in jobs(cut, 1, rank=1, world=2)]
    [(1, 4, 8), (2, 8, 9)]
    >>> [(j.window, j.first, j.last) for j in jobs(cut, 1, rank=0, world=4)]
    [(0, 0, 1), (1, 4, 5), (2, 8, 8)]
    """
    count = len(cut.frames)
    if count >= world:
        mine = range(rank * count // world, (rank + 1) * count // world)
        return [Job(w, *cut.frames[w], shared=False) for w in mine]
    result = []
    for w, (first, last) in enumerate(cut.frames):
        groups = -(-(last - first) // group_size)
        cuts = [min(last, first + r * groups // world * group_size) for r in (rank, rank + 1)]
        result.append(Job(w, cuts[0], cuts[1], shared=True))
    return result


@dataclass(frozen=True)
class Watcher:
    """Everything that one rank needs to watch its part of the video."""

    adapter: Adapter
    plan: VisualPlan
    frames: FramePlan
    cut: Windows
    method: Reducer
    seed: int
    group: Any
    stages: Stages
    question: Tensor | None = None
    """(m, hidden) rows of the question, for methods that look at it."""

    def watch(self, rank: int, world: int) -> Kept:
        """Read, encode and reduce this rank's frames. Collective where windows are shared."""
        todo = jobs(self.cut, self.plan.frames_per_group, rank, world)
        total, done = sum(j.last - j.first for j in todo), 0
        pictures = _Pictures(self.plan)
        kept: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for job in todo:
            tokens = []
            for batch in self._batches(job, pictures):
                tokens.append(batch)
                done += self.plan.frames_per_group * batch.grid[0][0]
                self.stages.log.progress(min(done, total), total)
            with self.stages.span("reduce"):
                kept.append(self._reduce(job, self._asked(join(tokens or [self._nothing(job.first)]))))
        return self._together(kept, pictures)

    def _batches(self, job: Job, pictures: _Pictures) -> Iterator[VisualTokens]:
        size = -(-ENCODE_FRAMES // self.plan.frames_per_group) * self.plan.frames_per_group
        stream = read(self.frames, job.first, job.last)
        for first in range(job.first, job.last, size):
            with self.stages.span("read"):
                images = [image for _, (_, image) in zip(range(min(size, job.last - first)), stream)]
                pictures.look(first, images)
                images = [resized(image, *self.frames.size) for image in images]
            with self.stages.span("encode"):
                yield self._encode(images, first)

    def _encode(self, images: Sequence[np.ndarray], first: int) -> VisualTokens:
        batch = torch.from_numpy(np.stack(images))
        return self.adapter.prepare(batch, self.plan, first=first, channels=self._channels())

    def _channels(self) -> tuple[str, ...]:
        return tuple(sorted((self.method.needs | self.method.wants) & self.adapter.channels))

    def _asked(self, tokens: VisualTokens) -> VisualTokens:
        """The tokens with the question beside them."""
        if self.question is None:
            return tokens
        return replace(tokens, channels={**tokens.channels, "text": self.question})

    def _nothing(self, first: int) -> VisualTokens:
        empty = torch.empty(0, self.plan.height, self.plan.width, 3, dtype=torch.uint8)
        start = first - first % self.plan.frames_per_group
        return self.adapter.prepare(empty, self.plan, first=start, channels=self._channels())

    def _reduce(self, job: Job, tokens: VisualTokens) -> tuple[Tensor, Tensor, Tensor | None]:
        """Kept rows, their numbers in the whole video, kept planes."""
        budget, seed = self.cut.budgets[job.window], self.seed + job.window
        first_token = self.cut.frames[job.window][0] // self.plan.frames_per_group * self.plan.tokens_per_group
        result: Reduction
        if job.shared:
            result = reduce_distributed(self.method, tokens, budget, self.group, generator_seed=seed)
        else:
            result = self.method.reduce(tokens, budget, torch.Generator().manual_seed(seed))
        planes = tokens.channels.get("planes")
        index = result.global_index.cpu() + first_token
        return result.apply(tokens.x), index, None if planes is None else result.apply(planes)

    def _together(self, kept: list[tuple[Tensor, Tensor, Tensor | None]], pictures: _Pictures) -> Kept:
        if not kept:
            nothing = self._nothing(0)
            kept = [(nothing.x, torch.empty(0, dtype=torch.int64), nothing.channels.get("planes"))]
        x, index = torch.cat([k[0] for k in kept]), torch.cat([k[1] for k in kept])
        planes = [k[2] for k in kept if k[2] is not None]
        return Kept(x, index, torch.cat(planes) if planes else None, pictures.taken)


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A frame (H, W, 3) uint8 in the size of the joined video; as it is where it has that size."""
    if image.shape[:2] == (height, width):
        return image
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.interpolate(
        planes, (height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return small[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()


def join(parts: Sequence[VisualTokens]) -> VisualTokens:
    """Runs of frames of one video, one after another, as one item."""
    x = torch.cat([p.x for p in parts])
    grid = (sum(p.grid[0][0] for p in parts), *parts[0].grid[0][1:])
    channels = {name: torch.cat([p.channels[name] for p in parts]) for name in parts[0].channels}
    return VisualTokens(x, [0, x.shape[0]], (grid,), torch.cat([p.positions for p in parts], dim=1), channels=channels)


class _Pictures:
    """Small copies of a few frames, spread evenly over the video, as they pass."""

    def __init__(self, plan: VisualPlan) -> None:
        groups = plan.grid[0]
        count = min(SAMPLES, groups)
        self.wanted = {(2 * i + 1) * groups // (2 * count) * plan.frames_per_group for i in range(count)}
        self.taken: list[dict[str, Any]] = []

    def look(self, first: int, images: Sequence[np.ndarray]) -> None:
        for number, image in enumerate(images, start=first):
            if number in self.wanted:
                self.taken.append({"frame": number, "image": pack_image(image)})


def with_cells(
    samples: list[dict[str, Any]], kept: Tensor, plan: VisualPlan, seconds: Sequence[float]
) -> list[dict[str, Any]]:
    """Sample frames with their kept cells, from the kept rows of the whole video (ascending)."""
    per_group = plan.tokens_per_group
    result = []
    for sample in samples:
        group = sample["frame"] // plan.frames_per_group
        inside = kept[(kept >= group * per_group) & (kept < (group + 1) * per_group)] - group * per_group
        cells = {"seconds": seconds[sample["frame"]], "grid": list(plan.grid[1:]), "cells": inside.tolist()}
        result.append({**sample, **cells})
    return result

"""Hours of video in the memory of one window: frames come in runs of any length, kept rows leave a window at a time.

    runs     [....][...][......][..]        whatever the reader yields
    windows  |.......|.......|....|         `window` frames each; each is reduced alone, then forgotten

Every method streams so: its time is linear in the length of the video and its memory that of one window. What it cannot do is
compare tokens of different windows; choose windows as long as memory and `method.work` allow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from token_reduction.budget import Budget, split_budget, windows
from token_reduction.reducer import Reducer
from token_reduction.reduction import Reduction
from token_reduction.tokens import VisualTokens


@dataclass(frozen=True, eq=False)
class KeptWindow:
    """What stays of one window.

    Attributes:
        first_frame, frames: the window in the video.
        reduction: of the window's tokens; x (k, D), positions (P, k): its rows; index (k,): their token numbers in the video.
        planes: `planes` of the kept rows, or None.
    """

    first_frame: int
    frames: int
    reduction: Reduction
    x: Tensor
    positions: Tensor
    index: Tensor
    planes: Any = None


def reduce_stream(
    method: Reducer,
    runs: Iterable[VisualTokens],
    budget: Budget,
    *,
    window: int,
    total_frames: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[KeptWindow]:
    """Reduce a video that comes in runs of frames, window by window.

    Args:
        runs: consecutive frames of one video, one item each, all of the same h x w.
        budget: a ratio holds in every window; a count is of the whole video and needs `total_frames`.
        window: frames reduced together; the last window may be shorter.
        total_frames: length of the video.
        seed: window i draws from seed + i.
        progress: called after each window with the frames done and the rows kept so far.

    Raises: ValueError where the runs do not fit together, or are not as long as was said.

    >>> from token_reduction import build
    >>> runs = [VisualTokens(torch.ones(2 * 4, 3), [0, 8], [(2, 2, 2)], torch.arange(8)[None] + 8 * i) for i in range(3)]
    >>> [w.index.tolist() for w in reduce_stream(build("uniform"), runs, Budget.ratio(0.25), window=4)]
    [[2, 6, 10, 14], [18, 22]]
    """
    said = _Said(budget, window, total_frames)
    done = kept = 0
    for number, tokens in enumerate(_regroup(runs, window)):
        share = said.share(number, done, tokens.grid[0])
        result = method.reduce(tokens, share, torch.Generator().manual_seed(seed + number))
        yield _kept(tokens, result, done)
        done, kept = done + tokens.grid[0][0], kept + result.index.numel()
        if progress:
            progress(done, kept)
    said.end(done)


class _Said:
    """The budget of each window, and whether the video is as long as was said."""

    def __init__(self, budget: Budget, window: int, total: int | None) -> None:
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"a window holds at least 1 frame, in whole numbers, got {window!r}")
        if not isinstance(budget, Budget):
            raise ValueError(f"a stream needs a Budget, got {budget!r}; Budget.ratio(1.0) keeps everything")
        if budget.kind == "count" and total is None:
            raise ValueError("a count of the whole video needs total_frames; give it, or a ratio")
        self.budget, self.window, self.total = budget, window, total
        self.shares: list[Budget] | None = None

    def share(self, number: int, done: int, grid: tuple[int, int, int]) -> Budget:
        t, h, w = grid
        if self.total is None:
            return self.budget
        if done + t > self.total:
            raise ValueError(
                f"the runs hold more than the {self.total} frames that were said; give the true total_frames"
            )
        if self.shares is None:
            cuts = windows(self.total, self.window)
            self.shares = split_budget(self.budget, [(last - first) * h * w for first, last in cuts])
        return self.shares[number]

    def end(self, done: int) -> None:
        if self.total is not None and done != self.total:
            raise ValueError(
                f"the runs hold {done} frames, not the {self.total} that were said; give the true total_frames"
            )


def _kept(tokens: VisualTokens, result: Reduction, first_frame: int) -> KeptWindow:
    t, h, w = tokens.grid[0]
    planes = tokens.channels.get("planes")
    if planes is not None:
        planes = result.apply(planes) if isinstance(planes, Tensor) else [result.apply(plane) for plane in planes]
    index = result.index + first_frame * h * w
    positions = result.apply_positions(tokens.positions)
    return KeptWindow(first_frame, t, result, result.apply(tokens.x), positions, index, planes)


def _regroup(runs: Iterable[VisualTokens], window: int) -> Iterator[VisualTokens]:
    """The same frames in items of `window` frames."""
    held: list[VisualTokens] = []
    frames = 0
    for run in runs:
        if not isinstance(run, VisualTokens):
            raise ValueError(f"runs are VisualTokens, got {type(run).__name__}; wrap frames in them, one item a run")
        if len(run.grid) != 1:
            raise ValueError(f"a run is one item, got {len(run.grid)}; give each video a stream of its own")
        if held and run.grid[0][1:] != held[0].grid[0][1:]:
            raise ValueError(f"runs of one video share (h, w), got {run.grid[0][1:]} after {held[0].grid[0][1:]}")
        first = 0
        while first < run.grid[0][0]:
            last = min(run.grid[0][0], first + window - frames)
            held.append(_frames(run, first, last))
            frames += last - first
            first = last
            if frames == window:
                yield _join(held)
                held, frames = [], 0
    if held:
        yield _join(held)


def _frames(run: VisualTokens, first: int, last: int) -> VisualTokens:
    _, h, w = run.grid[0]
    rows = torch.arange(first * h * w, last * h * w)
    part = run.shard(rows)
    return VisualTokens(part.x, [0, rows.numel()], [(last - first, h, w)], part.positions, part.channels)


def _join(parts: list[VisualTokens]) -> VisualTokens:
    if len(parts) == 1:
        return parts[0]
    x = torch.cat([part.x for part in parts])
    grid = (sum(part.grid[0][0] for part in parts), *parts[0].grid[0][1:])
    channels = {name: _join_channel(name, [part.channels[name] for part in parts]) for name in parts[0].channels}
    return VisualTokens(x, [0, len(x)], [grid], torch.cat([part.positions for part in parts], 1), channels)


def _join_channel(name: str, values: list[Any]) -> Any:
    if name == "text":
        return values[0]
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    return [torch.cat(planes) for planes in zip(*values)]

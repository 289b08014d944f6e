"""Which frames of which clips: pure data, made from what `launch.video.probe` found.

One clock runs over all clips, joined in order; the first frame of a clip is on screen from the moment the clip begins.
The frame chosen for time t is the one on screen at t: the last whose presentation time is not after t.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

_SLACK = 1e-6
"""Seconds by which two times may differ and count as equal: above rounding of k / fps, below any frame's duration."""


class VideoError(ValueError):
    """A video, or what was asked of it, cannot be used; one line: what was given, what is allowed, how to mend it."""


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` found: `frames` that can be shown, `fps` their mean rate, `seconds` with the last frame's own."""

    path: str
    width: int
    height: int
    frames: int
    fps: float
    seconds: float
    codec: str
    ticks: Sequence[int] = field(repr=False)
    """Presentation time of each frame in units of `tick_seconds`, the first at 0: a `range` where evenly spaced."""
    tick_seconds: Fraction = field(repr=False)
    origin: int | None = field(repr=False)
    """Time stamp of the first frame in the file; None: the file has none, so frames are counted from its start."""

    def index_at(self, seconds: float) -> int:
        """Number of the frame on screen `seconds` after the clip's beginning."""
        return max(0, bisect_right(self.ticks, (seconds + _SLACK) / self.tick_seconds) - 1)


@dataclass(frozen=True, slots=True)
class FrameRef:
    """Frame `index` of clip number `clip`, chosen for the time `seconds` on the joined clock."""

    clip: int
    index: int
    seconds: float


@dataclass(frozen=True)
class FramePlan:
    """Which frames of which clips, in order: `clips[ref.clip]` is a reference's clip, a looped clip is listed again."""

    clips: tuple[VideoInfo, ...]
    refs: tuple[FrameRef, ...]

    def __len__(self) -> int:
        return len(self.refs)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the joined video: that of the first chosen frame."""
        clip = self.clips[self.refs[0].clip]
        return clip.height, clip.width

    @property
    def other_sizes(self) -> list[str]:
        """Chosen clips of another size, as "path WxH", each once."""
        chosen = (self.clips[ref.clip] for ref in self.refs)
        return list(dict.fromkeys(f"{c.path} {c.width}x{c.height}" for c in chosen if (c.height, c.width) != self.size))


def plan_frames(
    infos: Sequence[VideoInfo],
    *,
    fps: float | None = None,
    count: int | None = None,
    start: float = 0.0,
    stop: float | None = None,
) -> FramePlan:
    """Choose frames in [start, stop) seconds of the joined clips.

        fps:      t_k = start + k / fps                     for every t_k < stop
        count:    t_k = start + k (stop - start) / count    for k = 0 .. count - 1
        neither:  every frame that comes on screen in the range

    More frames than the clip has in that time repeat frames; nothing is invented between them.

    Args:
        infos: clips in order, from `probe` or `join`; the same one may stand there many times.
        fps: frames per second of video. count: number of frames. At most one of the two.
        start, stop: seconds on the joined clock; stop defaults to the end.

    Raises:
        VideoError: fps or count not positive, both given, or a range that is empty or not inside the video.

    Example:
        >>> clip = VideoInfo("clip.mp4", 64, 48, 50, 25.0, 2.0, "h264", range(50), Fraction(1, 25), 0)
        >>> [(ref.clip, ref.index, ref.seconds) for ref in plan_frames([clip, clip], fps=2, start=1).refs]
        [(0, 25, 1.0), (0, 37, 1.5), (1, 0, 2.0), (1, 12, 2.5), (1, 25, 3.0), (1, 37, 3.5)]
    """
    clips = tuple(infos)
    if not clips:
        raise VideoError("no clip was given; allowed: a list of one or more probed clips; probe a video first")
    begins = np.concatenate([[0.0], np.cumsum([clip.seconds for clip in clips])]).tolist()
    stop = _check_range(start, stop, begins[-1])
    _check_rate(fps, count)
    if fps is None and count is None:
        refs = _every_frame(clips, begins, start, stop)
    else:
        number = count if count is not None else math.ceil((stop - start) * fps - _SLACK * fps)
        gap = (stop - start) / count if count is not None else 1 / fps
        times = (start + k * gap for k in range(max(1, number)))
        refs = (_on_screen(clips, begins, time) for time in times)
    plan = FramePlan(clips, tuple(refs))
    if not plan.refs:
        raise VideoError(
            f"no frame comes on screen from {start:g} to {stop:g} s; allowed: a range with a frame; widen it or set fps"
        )
    return plan


def _every_frame(clips: Sequence[VideoInfo], begins: Sequence[float], start: float, stop: float) -> Iterator[FrameRef]:
    for number, (clip, begin) in enumerate(zip(clips, begins)):
        for index, tick in enumerate(clip.ticks):
            seconds = begin + float(tick * clip.tick_seconds)
            if start - _SLACK <= seconds < stop - _SLACK:
                yield FrameRef(number, index, seconds)


def _on_screen(clips: Sequence[VideoInfo], begins: Sequence[float], seconds: float) -> FrameRef:
    number = min(bisect_right(begins, seconds + _SLACK) - 1, len(clips) - 1)
    return FrameRef(number, clips[number].index_at(seconds - begins[number]), seconds)


def _check_rate(fps: float | None, count: int | None) -> None:
    if fps is not None and count is not None:
        raise VideoError(f"both fps={fps} and count={count} were given; allowed: one of them; leave the other out")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise VideoError(
            f"fps={fps} was given; allowed: a finite rate above 0; give fps=2 for example, or fps=0.1 for one in 10 s"
        )
    if count is not None and not (math.isfinite(count) and count >= 1 and count == int(count)):
        raise VideoError(
            f"count={count} was given; allowed: a whole number of frames from 1 up; give for example count=16"
        )


def _check_range(start: float, stop: float | None, total: float) -> float:
    given = f"start={start:g}" + ("" if stop is None else f" stop={stop:g}")
    allowed = f"allowed: 0 <= start < stop <= {total:.3f}, the seconds of the video"
    end = total if stop is None else stop
    # 1 ms of grace: this message, like most players, shows times in milliseconds.
    if not (math.isfinite(start) and math.isfinite(end) and 0 <= start < min(end, total) and end <= total + 1e-3):
        raise VideoError(f"no frames lie in the range {given}; {allowed}; move the range inside it, or loop the clip")
    return min(end, total)

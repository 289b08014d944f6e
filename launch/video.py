"""Frames out of video files: probe, choose, stream.

    paths ── probe ──> VideoInfo ── plan_frames ──> FramePlan (pure data) ── read ──> (number, RGB frame), ...

Reading holds one decoded frame besides the decoder's own buffers, whatever the length of the video. Pixels are as stored (one
that is not square is not stretched); a rotation noted in the file is applied.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from launch.frame_plan import FramePlan, FrameRef, VideoError, VideoInfo, plan_frames

__all__ = ["FramePlan", "FrameRef", "VideoError", "VideoInfo", "join", "plan_frames", "probe", "read"]


def probe(path: str | Path) -> VideoInfo:
    """Measure one file by walking through its packets, without decoding more than its first frame.

    Frames are counted as the distinct presentation times of the packets of the first video stream, less what an edit
    list cuts away and what precedes the first key frame (it cannot be decoded). Where the format does not give each
    frame a time (AVI, MPEG-PS, raw streams) packets are counted, the rate is taken as even, and reading always decodes
    from the clip's start. The count in the container's header is not used.

    Raises:
        VideoError: missing, empty, not a regular file, not a video, no video stream, truncated, or not decodable.

    Example: `probe("clip.mp4").frames`
    """
    from launch.demux import scan

    return scan(_file(path))


def join(paths: Sequence[str | Path], loop: int = 1) -> tuple[VideoInfo, ...]:
    """Probe clips to be shown one after another, the whole list `loop` times; each path is probed once.

    Raises:
        VideoError: no path, loop below 1, or what `probe` refuses.
    """
    if not paths:
        raise VideoError("no video was given; allowed: one or more video files; name at least one")
    if not (math.isfinite(loop) and loop >= 1 and loop == int(loop)):
        raise VideoError(
            f"loop={loop} was given; allowed: a whole number from 1 up; leave it out to show the clips once"
        )
    infos = {str(path): probe(path) for path in dict.fromkeys(paths)}
    return tuple(infos[str(path)] for path in paths) * int(loop)


def read(plan: FramePlan, first: int, last: int, *, threads: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Stream frames first .. last - 1 of a plan: pairs of the number in the plan and a uint8 RGB array (H, W, 3).

    Each clip is opened when its first frame is wanted, entered at the key frame before it, and decoded up to the last
    frame wanted. Clips listed again are opened again. Arrays are fresh: the caller may keep or change them.

    Args:
        threads: threads of the decoder; each adds a few frames to its buffers.

    Raises:
        VideoError: first and last are not 0 <= first <= last <= len(plan) (at once); a frame is missing or damaged, as
            when the file was cut short or changed after it was probed (when it is reached, naming the frame).

    Example: `for number, frame in read(plan_frames(join(["clip.mp4"]), fps=1), 0, 4): ...`
    """
    if not 0 <= first <= last <= len(plan):
        raise VideoError(
            f"read got first={first} last={last}; allowed: 0 <= first <= last <= {len(plan)}; keep inside the plan"
        )
    return _stream(plan, first, last, threads)


def _stream(plan: FramePlan, first: int, last: int, threads: int) -> Iterator[tuple[int, np.ndarray]]:
    from launch.demux import frames, to_rgb

    for clip, group in groupby(range(first, last), key=lambda number: plan.refs[number].clip):
        numbers, info = list(group), plan.clips[clip]
        source, reached, frame = frames(info, plan.refs[numbers[0]].index, threads), -1, None
        for number in numbers:
            index = plan.refs[number].index
            before = reached
            while reached < index:
                before = max(before, reached)
                reached, frame = next(source, (info.frames, None))
            if reached != index:
                raise _lost(info, index, before)
            yield number, to_rgb(info, index, frame)


def _file(path: str | Path) -> Path:
    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise VideoError(
            f"video {path} cannot be found ({error.strerror}); allowed: a video file that exists; check the name"
        ) from None
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(f"video {path} is a directory; allowed: one file; name the file inside it")
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(
            f"video {path} is a device or a pipe; allowed: a regular file; write the video to a file first"
        )
    if status.st_size == 0:
        raise VideoError(f"video {path} is empty (0 bytes); allowed: a complete video file; copy or download it again")
    return path


def _lost(info: VideoInfo, index: int, before: int) -> VideoError:
    seconds = float(info.ticks[index] * info.tick_seconds)
    reached = f"decoding ended after frame {before}" if before >= 0 else "no frame before it could be decoded"
    return VideoError(
        f"video {info.path}: frame {index} of {info.frames} ({seconds:.3f} s, counted from 0) is missing: {reached};"
        " allowed: the complete file that was probed; copy it again"
    )

"""The part of `launch.video` that speaks to PyAV: walk through a file's packets, decode from a frame on.

A frame is known by its presentation time stamp, which packets carry before anything is decoded:

    packets in decoding order   I0 P3 B1 B2 P6 B4 B5 ...     stamps sorted   0 1 2 3 4 5 6 ...     number = rank therein
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from launch.frame_plan import VideoError, VideoInfo

_HEADER_STATES_LENGTH = {"mov", "matroska", "webm", "avi", "flv", "asf", "ivf"}
_SHORTFALL = 0.5
"""Seconds a file may end before the length its header states and still count as whole: headers round."""
_BACK_OFF = (0, 1, 4, 16, 64)
"""Seconds before the wanted frame at which to enter, one after another until the decoder starts early enough."""


@dataclass
class _Walk:
    """What one pass over all packets found."""

    stamps: array = field(default_factory=lambda: array("q"))
    packets: int = 0
    stamped: bool = True
    entered: bool = False
    key: int | None = None
    latest: tuple[int, int] = (-(2**63), 0)
    end: float = 0.0
    cut: bool = False


def scan(path: Path) -> VideoInfo:
    """`launch.video.probe` of a path that is a regular file."""
    with _open(path) as container:
        stream = _video_stream(container, path)
        walk = _walk(container, stream, path)
        # AVI has no presentation times and MPEG-PS has some: libavformat's guesses can be wrong where frames reorder.
        walk.stamped &= container.format.name not in ("avi", "mpeg")
        _refuse_truncated(container, stream, walk, path)
        codec, base = stream.codec_context.name, stream.time_base
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
    if walk.stamped:
        stamps = np.unique(np.frombuffer(walk.stamps, dtype=np.int64))
        stamps = stamps[stamps >= walk.key] if walk.entered else stamps[:0]
        ticks, origin = _compact(stamps - stamps[:1]), int(stamps[0]) if len(stamps) else 0
    else:
        ticks, origin, base = range(walk.packets), None, 1 / rate
    if not ticks:
        raise VideoError(
            f"video {path} holds no key frame; allowed: a stream that can be decoded; encode or copy it again"
        )
    span, gaps = ticks[-1] * base, len(ticks) - 1
    hold = walk.latest[1] * base if walk.stamped and walk.latest[1] > 0 else (span / gaps if gaps else 1 / rate)
    fps = gaps / span if gaps else 1 / hold
    info = VideoInfo(str(path), 0, 0, len(ticks), float(fps), float(span + hold), codec, ticks, base, origin)
    number, frame = next((pair for pair in frames(info, 0, 1) if pair[0] >= 0), (-1, None))
    if number != 0:
        raise VideoError(
            f"video {path}: its first frame cannot be decoded; allowed: a codec that PyAV decodes; encode it as H.264"
        )
    height, width = _pixels(frame).shape[:2]
    return replace(info, height=height, width=width)


def frames(info: VideoInfo, index: int, threads: int) -> Iterator[tuple[int, Any]]:
    """Decoded frames with their numbers, from frame `index` or somewhat earlier to the end or where decoding fails."""
    tick = info.ticks[index]
    ticks_per_second = 1 / info.tick_seconds
    entries = [entry for back in _BACK_OFF if (entry := tick - round(back * ticks_per_second)) > 0]
    if info.origin is None:
        entries = []
    # Entering at a time stamp may land on a key frame shown after it (one that other frames precede on screen), or on
    # pictures the decoder drops because they lean on frames before the entry: then enter earlier, at last at the start.
    for entry in [*entries, None]:
        source = _decode(info, entry, threads)
        reached, frame = next(source, (None, None))
        if frame is not None and (reached <= tick or entry is None):
            yield bisect_right(info.ticks, reached) - 1, frame
            for reached, frame in source:
                yield bisect_right(info.ticks, reached) - 1, frame
            return


def to_rgb(info: VideoInfo, index: int, frame: Any) -> np.ndarray:
    """Pixels of a decoded frame, uint8 (H, W, 3), upright."""
    pixels = _pixels(frame)
    if frame.is_corrupt:
        raise VideoError(
            f"video {info.path}: frame {index} of {info.frames} is damaged; allowed: an intact file; copy it again"
        )
    if pixels.shape[:2] != (info.height, info.width):
        raise VideoError(
            f"video {info.path}: frame {index} is {pixels.shape[1]}x{pixels.shape[0]}, the first was"
            f" {info.width}x{info.height}; allowed: one size throughout; encode it again with one size"
        )
    return pixels


def _pixels(frame: Any) -> np.ndarray:
    quarter_turns = round(frame.rotation / 90) % 4
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, quarter_turns)) if quarter_turns else pixels


def _decode(info: VideoInfo, entry: int | None, threads: int) -> Iterator[tuple[int, Any]]:
    import av

    with _open(Path(info.path)) as container:
        stream = _video_stream(container, Path(info.path))
        stream.codec_context.thread_count = threads
        stream.codec_context.thread_type = "AUTO"
        if entry is not None:
            # A format that cannot be entered in the middle is read from its start.
            with suppress(av.error.FFmpegError):
                container.seek(info.origin + entry, stream=stream)
        count, entered = 0, False
        # The reader of the frames knows which one it lacks and says so: here decoding just ends where it fails.
        with suppress(av.error.FFmpegError):
            for packet in container.demux(stream):
                # Before its first key frame a decoder has nothing to build on; some raise on what precedes it.
                entered |= packet.is_keyframe
                for frame in packet.decode() if entered else ():
                    if info.origin is None:
                        yield count, frame
                        count += 1
                    elif frame.pts is not None:
                        yield frame.pts - info.origin, frame


def _walk(container: Any, stream: Any, path: Path) -> _Walk:
    import av

    walk, video, codec = _Walk(), stream.index, stream.codec_context.name
    try:
        for packet in container.demux():
            stamp = packet.pts if packet.pts is not None else packet.dts
            if packet.size and stamp is not None:
                walk.end = max(walk.end, float((stamp + (packet.duration or 0)) * packet.time_base))
            if packet.size and packet.stream_index == video:
                _note(walk, packet, hidden=codec == "vp8" and not memoryview(packet)[0] >> 4 & 1)
    except av.error.FFmpegError as error:
        raise VideoError(
            f"video {path} cannot be read after frame {walk.packets} ({error.strerror}); allowed: an intact file;"
            " copy it again"
        ) from None
    return walk


def _note(walk: _Walk, packet: Any, hidden: bool) -> None:
    walk.cut = packet.is_corrupt
    if not (walk.entered or packet.is_keyframe):
        return
    if not walk.entered:
        walk.entered, walk.key = True, packet.pts
    walk.stamped &= packet.pts is not None
    # VP8 stores pictures that are only leaned on, never shown, as packets of their own (bit 4 of the first byte).
    if packet.is_discard or hidden:
        return
    walk.packets += 1
    if packet.pts is not None:
        walk.stamps.append(packet.pts)
        walk.latest = max(walk.latest, (packet.pts, packet.duration or 0))


def _refuse_truncated(container: Any, stream: Any, walk: _Walk, path: Path) -> None:
    kinds = set(container.format.name.split(","))
    size = path.stat().st_size
    outside = "mov" in kinds and any(entry.pos + entry.size > size for entry in stream.index_entries)
    stated = (container.duration or 0) / 1e6
    short = bool(kinds & _HEADER_STATES_LENGTH) and walk.end < stated - _SHORTFALL
    if walk.cut or outside or short:
        whole = walk.packets - walk.cut
        of = f" of {stream.frames}" if stream.frames > whole else ""
        raise VideoError(
            f"video {path} is truncated: it ends after frame {whole}{of} ({walk.end:.2f} s of"
            f" {max(stated, walk.end):.2f} s); allowed: a complete file; copy or download it again"
        )


def _compact(ticks: np.ndarray) -> Sequence[int]:
    steps = np.diff(ticks)
    if len(ticks) == 0 or (len(steps) and (steps != steps[0]).any()):
        return tuple(ticks.tolist())
    step = int(steps[0]) if len(steps) else 1
    return range(0, step * len(ticks), step)


def _open(path: Path) -> Any:
    try:
        import av
    except ImportError:
        raise VideoError(
            "reading a video needs the package av; run `make setup` or install the extra `video`"
        ) from None
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(
            f"{path} is not a video that can be read ({error.strerror}); allowed: mp4, mkv, webm, mov, avi, ts;"
            " if it was cut short it has lost its index: copy or download it again"
        ) from None
    if container.format.name in ("tty", "image2") or container.format.name.endswith("_pipe"):
        container.close()
        raise VideoError(
            f"{path} is text or a still picture, not a video; allowed: mp4, mkv, webm, mov, avi, ts; name such a file"
        )
    return container


def _video_stream(container: Any, path: Path) -> Any:
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
    raise VideoError(
        f"{path} has no video stream (streams: {kinds}); allowed: a file with moving pictures; name another file"
    )

"""Small clips whose grey level is the frame's number, so that an array tells which frame it is."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from launch.video import read

GOP = "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"
CASES = {
    "closed.mp4": {"options": {"x264-params": GOP}},
    "open.mp4": {"options": {"x264-params": GOP + ":open-gop=1"}},
    "open.mkv": {"options": {"x264-params": GOP + ":open-gop=1"}},
    "open.ts": {"options": {"x264-params": GOP + ":open-gop=1"}},
    "late.mp4": {"options": {"x264-params": GOP}, "shift": 50},
    "late.mkv": {"options": {"x264-params": GOP}, "shift": 50},
    "fragments.mp4": {"options": {"x264-params": GOP}, "muxer": {"movflags": "frag_keyframe+empty_moov"}},
    "no_stamps.avi": {"options": {"x264-params": GOP}},
    "no_stamps.h264": {"options": {"x264-params": GOP}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"bf": "2", "g": "12", "qmin": "1", "qmax": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"bf": "2", "g": "12", "qmin": "1", "qmax": "2"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12"}},
}


def write(
    path: Path, count=40, codec="libx264", options=None, muxer=None, shift=0, times=None, turn=None, picture=None
):
    """A 64 x 48 clip, 25 ticks a second, frame k of grey level 10 + 5 k, or what picture(k) draws."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if turn is not None:
            stream.set_display_rotation(turn)
        for k in range(count):
            array = picture(k) if picture else np.full((48, 64, 3), 10 + 5 * k, np.uint8)
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = shift + (times[k] if times else k), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def remux(source: Path, target: Path, change=None, **muxer) -> Path:
    """Copy the packets; change(number, packet) may return another packet, or None to leave it out."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=muxer) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(p for p in old.demux(video=0) if p.size):
            packet = change(number, packet) if change else packet
            if packet is not None:
                packet.stream = stream
                new.mux(packet)
    return target


def cut(source: Path, target: Path, share: float) -> Path:
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def shown(array: np.ndarray) -> int:
    """The number of the frame that a grey array shows."""
    return round((float(array.mean()) - 10) / 5)


def numbers(plan, first=0, last=None) -> list[int]:
    return [shown(array) for _, array in read(plan, first, len(plan) if last is None else last)]

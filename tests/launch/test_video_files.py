"""Files that cannot be used are refused in one line, and reading holds no more memory for a longer video."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from launch import assets
from launch.video import VideoError, plan_frames, probe, read
from tests.launch.clips import CASES, cut, remux, write


def refusal(path) -> str:
    with pytest.raises(VideoError) as caught:
        probe(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and "allowed: " in text and text.count(";") >= 2
    return text


def test_files_that_are_no_videos_are_refused_in_one_line(tmp_path) -> None:
    assert "cannot be found (No such file" in refusal(tmp_path / "missing.mp4")
    assert "is a directory" in refusal(tmp_path)
    (tmp_path / "empty.mp4").touch()
    assert "is empty (0 bytes)" in refusal(tmp_path / "empty.mp4")
    for name in ("words.mp4", "words.txt"):
        (tmp_path / name).write_text("not a video\n" * 100)
        assert "not a video" in refusal(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    assert "a pipe" in refusal(tmp_path / "pipe")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 48000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    assert "no video stream (streams: audio)" in refusal(tmp_path / "sound.mp4")
    with av.open(str(tmp_path / "still.png"), "w", format="image2") as container:
        stream = container.add_stream("png")
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
    assert "still picture" in refusal(tmp_path / "still.png")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_clip_is_refused_and_the_frame_reached_is_named(tmp_path, share) -> None:
    real = assets.find("clip:bigbuckbunny")  # its index is at the end: nothing can be known without it
    assert "lost its index" in refusal(cut(real, tmp_path / "no_index.mp4", share))
    whole = remux(real, tmp_path / "index_first.mp4", movflags="faststart")
    with av.open(str(whole)) as container:
        sizes = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    broken = cut(whole, tmp_path / "cut.mp4", share)
    intact = sum(position + size <= broken.stat().st_size for position, size in sizes)
    assert f"truncated: it ends after frame {intact} of 132" in refusal(broken)
    position, _ = sizes[131]  # cut between two frames: no frame is damaged, the last is not there
    broken.write_bytes(whole.read_bytes()[:position])
    assert "truncated: it ends after frame 131 of 132" in refusal(broken)


def test_a_truncated_file_without_index_is_refused_all_the_same(tmp_path) -> None:
    bikes = assets.find("clip:bikes")
    for whole in (
        remux(bikes, tmp_path / "whole.mkv"),  # states its length
        remux(bikes, tmp_path / "fragments.mp4", movflags="frag_keyframe+empty_moov"),  # its last packet is cut
        write(tmp_path / "whole.avi", 48, **CASES["mpeg4.avi"]),
        write(tmp_path / "whole.ivf", 48, **CASES["vp9.webm"]),
    ):
        assert probe(whole).frames in (48, 250)
        assert "truncated: it ends after frame" in refusal(cut(whole, tmp_path / f"cut_{whole.name}", 0.5))


def test_a_cut_too_short_for_the_stated_length_shows_in_the_last_packet(tmp_path) -> None:
    whole = write(tmp_path / "whole.ivf", 48, codec="libvpx")
    whole.write_bytes(whole.read_bytes()[:-5])
    assert "truncated: it ends after frame 47 of 48" in refusal(whole)


def test_a_file_cut_short_after_the_probe_names_the_frame_when_it_is_reached(tmp_path) -> None:
    path = remux(assets.find("clip:bigbuckbunny"), tmp_path / "clip.mp4", movflags="faststart")
    plan = plan_frames([probe(path)])
    cut(path, path, 0.5)
    got = []
    with pytest.raises(VideoError, match=r"frame \d+ of 132 \(.* s, counted from 0\)") as caught:
        got.extend(number for number, _ in read(plan, 0, len(plan)))
    assert got == list(range(len(got))) and 40 < len(got) < 60
    assert f"frame {len(got)} of 132" in str(caught.value) and f"after frame {len(got) - 1};" in str(caught.value)
    path.unlink()
    with pytest.raises(VideoError, match="not a video that can be read"):
        list(read(plan, 0, 1))


MEASURE = """
import resource, sys
from launch.video import join, plan_frames, read
plan = plan_frames(join([sys.argv[1]], loop=int(sys.argv[2])))
count = sum(1 for _ in read(plan, 0, len(plan)))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_bytes(clip: Path, loop: int, frames: int) -> int:
    command = [sys.executable, "-c", MEASURE, str(clip), str(loop)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    count, peak = map(int, shown.stdout.split())
    assert count == frames
    return peak


def test_peak_memory_is_flat_in_the_length_of_the_video(tmp_path) -> None:
    bikes = assets.find("clip:bikes")  # a frame has 0.26 MB as decoded, 0.5 MB as RGB: held frames would show at once
    long = tmp_path / "long.mp4"
    with av.open(str(bikes)) as old, av.open(str(long), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for turn in range(4):
            old.seek(0)
            for packet in (packet for packet in old.demux(video=0) if packet.size):
                packet.pts, packet.dts = packet.pts + turn * 128000, packet.dts + turn * 128000
                packet.stream = stream
                new.mux(packet)
    once = peak_bytes(bikes, 1, 250)
    assert peak_bytes(bikes, 4, 1000) - once < 15e6
    assert peak_bytes(long, 1, 1000) - once < 15e6

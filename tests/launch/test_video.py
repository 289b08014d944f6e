"""Decoding: every frame that comes out is the one that was asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from launch import assets, demux
from launch.video import VideoInfo, join, plan_frames, probe, read
from tests.launch.clips import CASES, numbers, remux, shown, write


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    return {name: write(folder / name, **case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def clip(clips) -> VideoInfo:
    return probe(clips["closed.mp4"])


# probe


@pytest.mark.parametrize(
    ("name", "frames", "fps", "size"),
    [
        ("bigbuckbunny", 132, 25.0, (1280, 720)),
        ("bikes", 250, 25.0, (640, 272)),
        ("carphone_pristine", 120, 30000 / 1001, (176, 144)),
        ("carphone_distorted", 120, 30000 / 1001, (176, 144)),
    ],
)
def test_probe_is_right_about_the_real_clips(name, frames, fps, size) -> None:
    found = probe(assets.find(f"clip:{name}"))
    assert (found.frames, found.fps, (found.width, found.height), found.codec) == (frames, fps, size, "h264")
    assert found.seconds == pytest.approx(frames / fps)


@pytest.mark.parametrize("name", CASES)
def test_probe_counts_frames_and_seconds_in_every_container(clips, name) -> None:
    found = probe(clips[name])
    assert (found.frames, found.width, found.height) == (40, 64, 48)
    assert found.seconds == pytest.approx(1.6) and found.fps == pytest.approx(25)


def test_a_false_frame_count_in_the_header_is_not_believed(clips, tmp_path) -> None:
    data = clips["mpeg4.avi"].read_bytes()
    header = data.index(b"strh") + 8
    path = tmp_path / "lies.avi"
    # dwLength is the ninth field of 4 bytes of an AVI stream header
    path.write_bytes(data[: header + 32] + (7).to_bytes(4, "little") + data[header + 36 :])
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 7
    assert probe(path).frames == 40
    assert numbers(plan_frames([probe(path)])) == list(range(40))


def test_an_uneven_clip_shows_each_frame_until_the_next_one(tmp_path) -> None:
    times = [0, 1, 2, 12, 13, 20]
    found = probe(write(tmp_path / "uneven.mp4", 6, times=times))
    seconds = [k / 100 for k in range(80)]
    expected = [max(k for k, t in enumerate(times) if t / 25 <= s + 1e-9) for s in seconds]
    assert [found.index_at(s) for s in seconds] == expected
    assert numbers(plan_frames([found], fps=100, stop=0.8)) == expected
    assert [ref.seconds for ref in plan_frames([found]).refs] == pytest.approx([t / 25 for t in times])


def test_pictures_that_are_never_shown_are_not_counted(tmp_path) -> None:
    def hide(number, packet):
        if number != 5:
            return packet
        data = bytearray(bytes(packet))
        data[0] &= ~0x10  # the bit of a VP8 frame tag that says "show me"
        hidden = av.Packet(bytes(data))
        hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
        return hidden

    plain = write(tmp_path / "plain.webm", 12, codec="libvpx")
    found = probe(remux(plain, tmp_path / "hidden.webm", hide))
    assert found.frames == 11
    assert numbers(plan_frames([found])) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


def test_a_rotation_noted_in_the_file_is_applied(tmp_path) -> None:
    def picture(k):
        array = np.full((48, 64, 3), 40, np.uint8)
        array[:24, :32] = 220  # bright top left
        return array

    found = probe(write(tmp_path / "turned.mp4", 3, turn=-90, picture=picture))  # -90: a quarter turn clockwise
    assert (found.width, found.height) == (48, 64)
    (_, array), *_ = read(plan_frames([found]), 0, 1)
    assert np.abs(array.astype(int) - np.rot90(picture(0), -1)).mean() < 4


def test_what_an_edit_list_cuts_away_is_neither_counted_nor_shown(clips, tmp_path) -> None:
    def five_frames_earlier(number, packet):
        packet.pts, packet.dts = packet.pts - 5 * 512, packet.dts - 5 * 512
        return packet

    found = probe(remux(clips["closed.mp4"], tmp_path / "edited.mp4", five_frames_earlier))
    assert (found.frames, found.origin) == (35, 0) and found.seconds == pytest.approx(1.4)
    plan = plan_frames([found])
    assert numbers(plan) == list(range(5, 40)) == [numbers(plan, k, k + 1)[0] for k in range(35)]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("closed.mp4", "late.ts"),
        ("open.mkv", "late.mkv"),
        ("closed.mp4", "late.h264"),
    ],
)
def test_frames_before_the_first_key_frame_are_not_counted(clips, tmp_path, source, name) -> None:
    found = probe(remux(clips[source], tmp_path / name, lambda number, packet: packet if number >= 5 else None))
    plan = plan_frames([found])
    assert numbers(plan) == list(range(12, 40)) == [numbers(plan, k, k + 1)[0] for k in range(28)]


@pytest.mark.parametrize("name", ["closed.ts", "open.ts"])
def test_a_recording_that_begins_in_mid_stream_starts_at_its_first_key_frame(clips, tmp_path, name) -> None:
    whole = clips["open.ts"] if name == "open.ts" else write(tmp_path / "whole.ts", **CASES["closed.mp4"])
    (tmp_path / name).write_bytes(whole.read_bytes()[188 * 10 :])  # without ten of its packets of 188 bytes
    plan = plan_frames([probe(tmp_path / name)])
    assert numbers(plan) == list(range(12, 40)) == [numbers(plan, k, k + 1)[0] for k in range(28)]


# read


@pytest.mark.parametrize("name", CASES)
def test_entering_anywhere_gives_the_frames_of_reading_through(clips, name) -> None:
    plan = plan_frames([probe(clips[name])])
    through = dict(read(plan, 0, 40))
    assert list(through) == list(range(40)) and [shown(a) for a in through.values()] == list(range(40))
    for first in range(40):
        ((number, array),) = read(plan, first, first + 1)
        assert number == first and np.array_equal(array, through[first])


@pytest.mark.parametrize("fps", [1.0, 5.0, 7.3, 25.0, 60.0])
def test_read_returns_the_planned_frames_of_looped_clips(clips, fps) -> None:
    plan = plan_frames(join([clips["closed.mp4"], clips["late.mkv"]], loop=2), fps=fps)
    assert numbers(plan) == [ref.index for ref in plan.refs]
    assert plan.refs[-1].clip == 3
    half = len(plan) // 2
    assert numbers(plan, half - 1, half + 2) == [ref.index for ref in plan.refs[half - 1 : half + 2]]


def test_arrays_are_the_callers_own(clip) -> None:
    plan = plan_frames([clip], fps=50, stop=0.1)
    for _, array in read(plan, 0, len(plan)):
        assert array.dtype == np.uint8 and array.shape == (48, 64, 3) and array.flags.c_contiguous
        array[:] = 0
    first, second = (array for _, array in read(plan, 0, 2))
    first[:] = 0
    assert shown(second) == 0 and second.mean() > 5


def test_reading_nothing_opens_nothing(clip) -> None:
    assert list(read(plan_frames([replace(clip, path="nowhere.mp4")]), 3, 3)) == []


def test_decoding_with_two_threads_gives_the_same_frames(clip) -> None:
    plan = plan_frames([clip])
    pairs = zip(read(plan, 5, 30), read(plan, 5, 30, threads=2))
    assert all(a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in pairs)


def test_a_real_clip_decodes_to_the_frames_pyav_decodes() -> None:
    path = assets.find("clip:bikes")
    plan = plan_frames([probe(path)], count=7)
    wanted = {ref.index: number for number, ref in enumerate(plan.refs)}
    with av.open(str(path)) as container:
        frames = [f.to_ndarray(format="rgb24") for k, f in enumerate(container.decode(video=0)) if k in wanted]
    for (_, array), expected in zip(read(plan, 0, 7), frames, strict=True):
        assert np.array_equal(array, expected)


def test_entering_late_decodes_no_more_than_it_needs(tmp_path, monkeypatch) -> None:
    decoded = []

    def counting(*args):
        for pair in plain(*args):
            decoded.append(pair)
            yield pair

    plain = demux._decode
    picture = {"picture": lambda k: np.full((48, 64, 3), k % 200, np.uint8)}
    plan = plan_frames([probe(write(tmp_path / "long.mp4", 300, **CASES["closed.mp4"], **picture))])
    monkeypatch.setattr(demux, "_decode", counting)
    assert [number for number, _ in read(plan, 290, 292)] == [290, 291]
    assert len(decoded) <= 12 + 2

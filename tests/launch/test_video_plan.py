"""Choosing frames: for each time the frame on screen then, and a clear refusal of what cannot be chosen."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import assets
from launch.video import FrameRef, VideoError, VideoInfo, join, plan_frames, probe, read
from tests.launch.clips import CASES, numbers, write


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> VideoInfo:
    return probe(write(tmp_path_factory.mktemp("clips") / "closed.mp4", **CASES["closed.mp4"]))


def info(frames=50, seconds=2.0, path="made-up.mp4") -> VideoInfo:
    rate = Fraction(frames) / Fraction(str(seconds))
    return VideoInfo(path, 64, 48, frames, float(rate), seconds, "h264", range(frames), 1 / rate, 0)


def test_a_rate_picks_the_frame_on_screen_at_each_time() -> None:
    refs = plan_frames([info()], fps=10).refs
    assert [ref.index for ref in refs] == [k * 25 // 10 for k in range(20)]
    assert [ref.seconds for ref in refs] == pytest.approx([k / 10 for k in range(20)])


def test_the_clips_own_rate_picks_every_frame_once() -> None:
    for name in ("bikes", "carphone_pristine"):
        found = probe(assets.find(f"clip:{name}"))
        assert [ref.index for ref in plan_frames([found], fps=found.fps).refs] == list(range(found.frames))


def test_a_count_spreads_frames_evenly_and_the_full_count_takes_all() -> None:
    assert [ref.index for ref in plan_frames([info()], count=5).refs] == [0, 10, 20, 30, 40]
    assert [ref.index for ref in plan_frames([info()], count=50).refs] == list(range(50))
    assert [ref.index for ref in plan_frames([info()], count=4, start=1.0).refs] == [25, 31, 37, 43]


def test_a_higher_rate_than_the_clips_repeats_frames(clip) -> None:
    plan = plan_frames([clip], fps=50, stop=0.2)
    assert [ref.index for ref in plan.refs] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert numbers(plan) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_joined_clips_share_one_clock() -> None:
    plan = plan_frames([info(10, 1.0), info(40, 2.0), info(10, 1.0)], fps=2)
    assert plan.refs == tuple(
        FrameRef(c, i, t)
        for c, i, t in [
            (0, 0, 0),
            (0, 5, 0.5),
            (1, 0, 1),
            (1, 10, 1.5),
            (1, 20, 2),
            (1, 30, 2.5),
            (2, 0, 3),
            (2, 5, 3.5),
        ]
    )


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=4),
    st.fractions(Fraction(1, 10), 100),
)
def test_chosen_frames_are_those_on_screen_whatever_the_clips_and_rate(shapes, fps) -> None:
    clips = [info(frames, frames / rate) for frames, rate in shapes]
    plan = plan_frames(clips, fps=float(fps))
    # in exact arithmetic, frame by frame
    ends, total = [], Fraction(0)
    for number, (frames, rate) in enumerate(shapes):
        for index in range(frames):
            ends.append((total + Fraction(index + 1, rate), number, index))
        total += Fraction(frames, rate)
    for k, ref in enumerate(plan.refs):
        time = k / fps
        assert next((c, i) for end, c, i in ends if time + Fraction(1, 10**6) < end) == (ref.clip, ref.index)
    assert len(plan) in (max(1, int(total * fps)), int(total * fps) + 1)


@pytest.mark.parametrize("wrong", [{"fps": 0}, {"fps": -1}, {"fps": float("nan")}, {"fps": float("inf")}, {"count": 0}])
@pytest.mark.parametrize("more", [{}, {"start": 1.0}])
def test_a_rate_or_count_that_is_not_positive_is_refused(wrong, more) -> None:
    name = next(iter(wrong))
    with pytest.raises(VideoError, match=rf"{name}={wrong[name]} was given; allowed: .*; give"):
        plan_frames([info()], **wrong, **more)


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": 2.0},
        {"start": 5, "stop": 6},
        {"start": -1},
        {"start": 1, "stop": 1},
        {"start": 1, "stop": 0.5},
        {"stop": 2.5},
        {"start": float("nan")},
        {"stop": float("nan")},
        {"stop": float("inf")},
    ],
)
def test_a_range_without_frames_or_beyond_the_end_is_refused(wrong) -> None:
    with pytest.raises(VideoError, match=r"start=.* allowed: 0 <= start < stop <= 2\.000"):
        plan_frames([info()], fps=1, **wrong)


def test_contradictory_or_empty_requests_are_refused(clip) -> None:
    with pytest.raises(VideoError, match="both fps=1 and count=2"):
        plan_frames([info()], fps=1, count=2)
    with pytest.raises(VideoError, match=r"count=2\.5"):
        plan_frames([info()], count=2.5)
    with pytest.raises(VideoError, match="no clip"):
        plan_frames([], fps=1)
    with pytest.raises(VideoError, match="no frame comes on screen"):
        plan_frames([info()], start=0.01, stop=0.02)
    with pytest.raises(VideoError, match="loop=0"):
        join([clip.path], loop=0)
    with pytest.raises(VideoError, match="no video was given"):
        join([])
    for first, last in ((-1, 2), (3, 2), (0, 41)):
        with pytest.raises(VideoError, match=f"first={first} last={last}"):
            read(plan_frames([clip]), first, last)

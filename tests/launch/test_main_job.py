"""The main job as a user starts it: a real clip, real weights, four ranks, verified; and the ways to get it wrong."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.assets import find
from tests.launch import tiny_models
from tests.launch.drift import make_clip

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "launch", *arguments], capture_output=True, text=True, timeout=600)


def main_job(*settings: str) -> list[str]:
    """The arguments that `make video` gives to the command."""
    shown = subprocess.run(
        ["make", "-n", "video", *settings], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    recipe = next(line for line in shown.splitlines() if "/tokenring run" in line)
    return shlex.split(recipe)[1:]


def test_the_demo_on_four_ranks_equals_one_rank(tmp_path: Path) -> None:
    arguments = main_job("FRAMES=6", f"OUT={tmp_path / 'out'}")
    done = command(*arguments, "--json", "--max-new-tokens", "6")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verify"]["max_logit_diff"] <= 2e-4 and report["verify"]["same_tokens"]
    assert report["verify"]["max_logit_diff_all"] <= max(2 * report["verify"]["sdpa_eager_diff_all"], 2e-4)
    assert (report["ranks"], report["engine"], report["schedule"], report["frames"]) == (4, "torchrun", "tokenring", 6)
    assert (report["tokens_before"], report["tokens_after"]) == (6 * 256, 154)
    assert sum(report["tokens_per_rank"]) > 154 and max(report["tokens_per_rank"]) - min(report["tokens_per_rank"]) <= 2
    assert len(report["generated_ids"]) == 6 and report["text"]
    assert all(report["bytes_sent"][r][r] == 0 for r in range(4)) and report["bytes_sent"][0][3] > 0
    assert "mean nothing" in " ".join(report["notes"])
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"report.json", "report.txt", "kept.png", "timeline.png", "records", "logs"} <= made
    assert command("report", str(tmp_path / "out")).returncode == 0


def test_the_demo_with_experts_on_four_ranks_equals_the_dense_one() -> None:
    arguments = ["clip:bikes", "--frames", "2", "--nproc", "4", "--model", "demo-moe", "--experts", "4", "--verify"]
    done = command("run", *arguments, "--json", "--quiet", "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verify"]["max_logit_diff"] <= 2e-4 and report["verify"]["same_tokens"]
    found = report["experts"]
    assert (found["experts"], found["ep"], found["etp"], found["edp"]) == (4, 4, 1, 1)
    assert sum(found["tokens_per_expert"]) == sum(report["tokens_per_rank"]) * 2 * 30
    assert all(found["bytes_sent"][a][b] > 0 for a in range(4) for b in range(4) if a != b)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("main") / "drift.mp4", 12)


def test_a_model_directory_runs_over_ranks_and_is_verified(tmp_path: Path, clip: Path) -> None:
    folder = tiny_models.qwen3(tmp_path / "model")
    done = command(
        "run", str(clip), "--model", str(folder), "--nproc", "3", "--verify", "--json", "--max-new-tokens", "4"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verify"]["same_tokens"]


def bare_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3_vl"}')
    return folder


MISTAKES = {
    "missing file": (["none.mp4"], "none.mp4 cannot be found"),
    "not a video": (["text.mp4"], "text.mp4"),
    "no clip of the demo": (["clip:nope"], "its clips are clip:bigbuckbunny"),
    "truncated video": (["cut.mp4"], "cut.mp4"),
    "no frames in range": (["good.mp4", "--start", "7"], "no frames lie in the range start=7"),
    "unknown reducer": (["good.mp4", "--reduce", "prune:0.1"], "unknown reduction method 'prune'"),
    "unknown schedule": (["good.mp4", "--schedule", "star"], "one of auto, ring, biring, tokenring, gather"),
    "budget below a token": (["good.mp4", "--reduce", "divprune:0.00001"], "below one token"),
    "more ranks than tokens": (
        ["good.mp4", "--frames", "1", "--reduce", "uniform:1", "--nproc", "400"],
        "more ranks than the",
    ),
    "model without weights": (["good.mp4", "--model", "bare"], "has no weights"),
    "illegal folding": (
        ["good.mp4", "--model", "demo-moe", "--nproc", "4", "--ep", "3"],
        "rule 'etp x ep x pp divides world' is broken for experts",
    ),
    "experts for a dense model": (["good.mp4", "--ep", "2"], "model demo has no experts"),
    "wrong setting": (["good.mp4", "--set", "reduce.windw=3"], "reduce.window"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2_before_any_rank_starts(
    mistake: str, tmp_path: Path, clip: Path, monkeypatch, capfd
) -> None:
    from launch.cli import main

    monkeypatch.setattr("launch.engines.build", lambda name: pytest.fail("an engine was started"))
    (tmp_path / "good.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "text.mp4").write_text("no video at all\n" * 100)
    whole = find("clip:bikes").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    bare_model(tmp_path / "bare")
    monkeypatch.chdir(tmp_path)
    arguments, said = MISTAKES[mistake]
    start = time.monotonic()
    assert main(["run", *arguments, "--out", "out"]) == 2
    shown = capfd.readouterr()
    assert shown.out == "" and len(shown.err.strip().splitlines()) == 1, shown.err
    assert said in shown.err
    assert time.monotonic() - start < 10 and not (tmp_path / "out").exists()

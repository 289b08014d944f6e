"""Folders appear whole or not at all; progress reaches the screen."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import runner
from launch.cli import main
from launch.config import OutputConfig, RunConfig, VideoConfig
from launch.errors import ConfigError, Failure, Interrupted, RunFailed
from launch.output import RunFolder, check_target
from launch.progress import FileSink, Log, Relay, Screen

ROOT = Path(__file__).parents[2]
ENTRY = "tests.launch.fake_entries:adds"


def run(*arguments):
    return main(["run", *arguments], entry=ENTRY)


def complaint(capfd):
    """The one line on standard error; standard output is empty."""
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def test_out_appears_whole_and_report_renders_it_again(engine, tmp_path, capfd):
    target = tmp_path / "deep" / "o"
    assert run("a.mp4", "--nproc", "2", "--out", str(target), "--json") == 0
    first = json.loads(capfd.readouterr().out)
    names = {path.name for path in target.iterdir()}
    assert {"report.json", "report.txt", "records", "logs", "run.json"} <= names
    assert [path.name for path in target.parent.iterdir()] == ["o"]
    assert json.loads((target / "report.json").read_text()) == first
    (target / "report.json").unlink()
    (target / "report.txt").unlink()
    assert main(["report", str(target), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == first
    assert json.loads((target / "report.json").read_text()) == first
    assert main(["report", str(target)]) == 0
    assert capfd.readouterr().out == (target / "report.txt").read_text()


def test_an_earlier_run_is_replaced_only_when_asked(engine, tmp_path, capfd):
    target = tmp_path / "o"
    assert run("a.mp4", "--out", str(target)) == 0
    (target / "mine.txt").write_text("kept until replaced")
    capfd.readouterr()
    assert run("a.mp4", "--out", str(target)) == 2
    assert "--overwrite" in complaint(capfd)
    engine(Failure(rank=0, world=1, kind="exit", name="ended"))
    assert run("a.mp4", "--out", str(target), "--overwrite") == 1
    assert (target / "mine.txt").exists(), "a failed run must leave the earlier one alone"
    engine()
    assert run("a.mp4", "--out", str(target), "--overwrite", "--nproc", "2") == 0
    assert not (target / "mine.txt").exists()
    assert json.loads((target / "report.json").read_text())["ranks"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"o", "o.failed"}


def test_foreign_files_are_never_replaced(engine, tmp_path, capfd, monkeypatch):
    foreign = tmp_path / "theirs"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("x")
    for extra in ([], ["--overwrite"]):
        assert run("a.mp4", "--out", str(foreign), *extra) == 2
        assert "no run of ours" in complaint(capfd)
    assert run("a.mp4", "--out", str(foreign / "letter.txt")) == 2
    complaint(capfd)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="current folder"):
        check_target(".", False)
    assert [path.name for path in foreign.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted(signal.SIGTERM), ConfigError("no")])
def test_an_interrupted_run_leaves_nothing(error, tmp_path):
    with pytest.raises(type(error)), RunFolder(str(tmp_path / "o")) as folder:
        (folder.path / "half").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_cleared_by_the_next_run_and_a_busy_one_is_let_be(tmp_path):
    code = "import os, sys; from launch.output import RunFolder; RunFolder(sys.argv[1]).__enter__(); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "o")], cwd=ROOT).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".o.partial-")
    with RunFolder(str(tmp_path / "other")):
        assert left.exists(), "it is not a left-over of this name"
    with RunFolder(str(tmp_path / "o")) as busy:
        assert not left.exists()
        with RunFolder(str(tmp_path / "o")) as second:
            assert busy.path.exists()
            assert busy.path != second.path
    assert list(tmp_path.iterdir()) == []


def test_a_folder_kept_after_a_failure_is_not_swept(engine):
    engine(Failure(rank=0, world=1, kind="exit", name="ended"))
    kept = []
    for _ in range(2):
        with pytest.raises(RunFailed) as caught:
            runner.run(RunConfig(video=VideoConfig(paths=("a",))), entry=ENTRY)
        kept.append(caught.value.logs)
    assert kept[0] != kept[1]
    assert all(path.exists() for path in kept)


def test_more_ranks_than_the_cores_can_carry_is_a_warning(engine, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("launch.worker.cores", lambda: 1)
    assert run("a.mp4", "--nproc", "4", "--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["warnings"] == []
    assert "warning" not in err
    assert run("a.mp4", "--nproc", "5", "--json", "--out", str(tmp_path / "o")) == 0
    out, err = capfd.readouterr()
    (warning,) = json.loads(out)["warnings"]
    assert "5 ranks on 1 cores" in warning
    assert f"warning: {warning}\n" in err
    assert main(["report", str(tmp_path / "o"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["warnings"] == [warning]


def test_a_failed_run_without_out_names_a_folder_that_exists(engine):
    engine(Failure(rank=0, world=1, kind="exit", name="ended"))
    with pytest.raises(RunFailed) as caught:
        runner.run(RunConfig(video=VideoConfig(paths=("a",)), output=OutputConfig()), entry=ENTRY)
    assert (caught.value.logs / "rank-0.log").read_text() == "what rank 0 printed"


def test_progress_from_a_file_reaches_the_screen_as_plain_lines(tmp_path):
    log = Log(FileSink(tmp_path / "p"))
    log.stage("encode")
    log.progress(1, 4)
    log.line("two\nlines")
    log.close()
    out = io.StringIO()
    with Screen(out) as screen:
        relay = Relay(screen)
        relay.poll(tmp_path / "p")
        relay.poll(tmp_path / "p")
    assert out.getvalue() == "encode\ntwo lines\n"
    assert relay.stage == "encode"


def test_bars_on_a_terminal_show_stage_and_counts():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with Screen(out) as screen:
        for message in ({"stage": "encode"}, {"done": 2, "total": 4}, {"line": "[red]as is"}, {"stage": "decode"}):
            screen(message)
    for part in ("encode", "decode", "4/4", "[red]as is"):
        assert part in out.getvalue()


def test_stage_times_add_up_and_start_at_the_shared_origin():
    log = Log(origin=time.perf_counter() - 100)
    for name in ("read", "encode", "read"):
        log.stage(name)
    log.close()
    assert list(log.seconds_per_stage()) == ["read", "encode"]
    assert [event["name"] for event in log.stage_events()] == ["read", "encode", "read"]
    assert all(event["start"] >= 100 for event in log.stage_events())

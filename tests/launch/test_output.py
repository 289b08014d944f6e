"""Folders appear whole or not at all; progress reaches the screen."""

import io
import json
import signal
import time

import pytest

from launch import runner
from launch.cli import main
from launch.config import OutputConfig, RunConfig, VideoConfig
from launch.errors import ConfigError, Failure, Interrupted, RunFailed
from launch.output import RunFolder, check_target
from launch.progress import FileSink, Log, Relay, Screen

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

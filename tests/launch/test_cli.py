"""The command: exit codes, one line on standard error, nothing but the result on standard output, folders whole or absent."""

import json
import subprocess
import sys
import tempfile
import time
from importlib import metadata

import pytest

from launch.cli import main
from launch.errors import Failure
from tests.launch.command import ENTRIES, ROOT, command, complaint, run, temporary_files_in

pytestmark = pytest.mark.usefixtures("importable_by_ranks")

KEYS = {
    *("version", "hardware", "ranks", "engine", "schedule", "frames", "tokens_before", "tokens_after", "text"),
    *("tokens_per_rank", "cache_bytes_per_rank", "peak_bytes_per_rank", "bytes_sent", "generated_ids", "seconds"),
    "verify",
}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nproc", "2"], ["no video"]),
        (["a.mp4", "--nproc", "0"], ["engine.nproc", "1 or more"]),
        (["a.mp4", "--nproc", "two"], ["--nproc"]),
        (["a.mp4", "--nprocs", "2"], ["--nprocs"]),
        (["a.mp4", "--prompt"], ["--prompt"]),
        (["a.mp4", "--attention", "sparse"], ["sparse", "exact, anchor"]),
        (["a.mp4", "--attention", "anchor", "--schedule", "ring"], ["attention.schedule", "'ring'", "leave it out"]),
        (
            ["a.mp4", "--attention", "anchor", "--anchor-theta", "3", "--anchor-density", "0.1"],
            ["anchor.theta", "one of them"],
        ),
        (["a.mp4", "--schedule", "rings"], ["rings", "auto, ring, biring, tokenring, gather, mesh:AxB"]),
        (["a.mp4", "--engine", "slurm"], ["slurm", "torchrun, ray, mpi"]),
        (["a.mp4", "--top-k", "4"], ["top_k", "temperature"]),
        (["a.mp4", "--fps", "2", "--frames", "4"], ["choose one"]),
        (["a.mp4", "--set", "engine.nprocs=3"], ["engine.nproc"]),
        (["a.mp4", "--config", "none.yaml"], ["none.yaml"]),
        (["a.mp4", "--overwrite"], ["--out"]),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(arguments, words, capfd):
    assert run(*arguments) == 2
    line = complaint(capfd)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (None, [], ["none.mp4"]),
        (b"no video at all", [], ["none.mp4"]),
        (None, ["--reduce", "divprun:0.1"], ["divprun"]),
        (None, ["--reduce", "divprune:0"], ["at least 1", "got 0"]),
    ],
)
def test_bad_input_is_found_before_any_rank_starts(make, arguments, words, tmp_path, monkeypatch, capfd):
    def refuse(name):
        raise AssertionError("an engine was started")

    monkeypatch.setattr("launch.engines.build", refuse)
    video = tmp_path / "none.mp4"
    if make is not None:
        video.write_bytes(make)
    assert main(["run", str(video), *arguments]) == 2
    line = complaint(capfd)
    for word in words:
        assert word in line


def test_gpus_that_are_not_there_are_missed_before_any_folder_is_made(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("torchrun", "ray", "mpi"):
        assert run("a.mp4", "--device", "cuda", "--nproc", "2", "--engine", name) == 2
        assert "0 CUDA devices" in complaint(capfd)
    assert list(tmp_path.iterdir()) == []


def test_no_command_is_the_help_and_nothing_else_and_the_version_is_told(capfd):
    assert main([]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "Usage" in err
    assert "see --help" not in err
    assert main(["--version"]) == 0
    assert capfd.readouterr() == (f"tokenring {metadata.version('tokenring-parallel')}\n", "")
    assert main(["report"]) == 2
    assert complaint(capfd) == "tokenring: Missing argument 'DIR' (see --help)\n"


def test_an_unknown_command_and_no_saved_run_are_exit_code_2(tmp_path, capfd):
    assert main(["rnu"]) == 2
    complaint(capfd)
    assert main(["report", str(tmp_path)]) == 2
    assert str(tmp_path) in complaint(capfd)


def test_json_is_one_object_and_alone_on_standard_output(engine, capfd):
    assert run("a.mp4", "--nproc", "3", "--json") == 0
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert out.count("\n") == 1
    assert set(report) >= KEYS
    assert (report["ranks"], report["generated_ids"], report["verify"]) == (3, [7], None)
    assert report["config"]["engine.nproc"] == {"value": 3, "from": "--nproc"}
    for part in ("an engine prints", "a C library prints", "encode", "a hare"):
        assert part in err


@pytest.mark.parametrize("name", ["torchrun", "ray", "mpi"])
def test_a_real_run_prints_json_alone_even_when_ranks_print_and_leaves_no_temporary_files(name, tmp_path):
    environ = temporary_files_in(tmp_path / "tmp")
    arguments = command("adds", "run", "a.mp4", "--json", "--quiet", "--engine", name)
    done = subprocess.run(arguments, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["ranks"], report["generated_ids"], report["text"]) == (1, [1, 0], "sum 1")
    assert done.stderr == ""
    assert list((tmp_path / "tmp").iterdir()) == []


def test_without_json_the_page_is_on_standard_output_and_progress_is_not(engine, capfd):
    assert run("a.mp4") == 0
    out, err = capfd.readouterr()
    assert "a hare" in out
    assert "prints" not in out
    assert "encode" in err


def test_a_comparison_that_does_not_hold_is_exit_code_1_with_its_report(engine, tmp_path, capfd):
    assert run("a.mp4", "--verify", "--json", "--out", str(tmp_path / "o")) == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["verify"]["max_logit_diff"] == 1.0
    assert "verification failed" in err
    assert (tmp_path / "o" / "report.json").exists()


def test_a_failing_rank_is_one_line_and_its_logs_are_kept(tmp_path, capfd):
    target = tmp_path / "o"
    code = main(["run", "a.mp4", "--nproc", "3", "--quiet", "--out", str(target)], entry=f"{ENTRIES}:raises_on_2")
    assert code == 1
    logs = tmp_path / "o.failed" / "logs"
    assert complaint(capfd) == f"tokenring: rank 2 of 3: ValueError: frame 7 is bad, as said (logs: {logs})\n"
    assert "frame 7 is bad" in (logs / "rank-2.log").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["o.failed"]


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        ({"rank": -1, "kind": "timeout", "name": "timed out", "message": "no result after 5 s"}, 124),
        ({"rank": 0, "kind": "exception", "name": "VideoError", "message": "cut at frame 9", "bad_input": True}, 2),
        ({"rank": 1, "kind": "signal", "name": "SIGKILL"}, 1),
    ],
)
def test_the_exit_code_says_how_it_ended(engine, failure, code, capfd):
    engine(Failure(world=4, **failure))
    assert run("a.mp4", "--quiet") == code
    assert failure["name"] in complaint(capfd)


def test_help_is_there_in_a_second_and_loads_no_torch():
    code = "import sys, launch.cli; launch.cli.main(['run', '--help']); print('torch' in sys.modules)"
    started = time.process_time(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False")
    assert "--max-new-tokens" in done.stdout
    assert "video." in done.stdout
    assert "video.." not in done.stdout
    assert time.monotonic() - started[1] < 5, "a bound for a loaded machine; idle it takes a quarter of a second"

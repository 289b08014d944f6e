"""The command: exit codes, one line on standard error, nothing but the result on standard output, folders whole or absent."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest

from launch.cli import main
from launch.engines.rendezvous import discover, join
from launch.errors import ConfigError, Failure

ROOT = Path(__file__).parents[2]
ENTRIES = "tests.launch.fake_entries"
KEYS = {
    *("version", "hardware", "ranks", "engine", "schedule", "frames", "tokens_before", "tokens_after", "text"),
    *("tokens_per_rank", "cache_bytes_per_rank", "peak_bytes_per_rank", "bytes_sent", "generated_ids", "seconds"),
    "verify",
}


@pytest.fixture(autouse=True)
def importable_by_ranks(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def command(entry, *arguments):
    return [sys.executable, "-m", ENTRIES, entry, *arguments]


def run(*arguments):
    return main(["run", *arguments], entry=f"{ENTRIES}:adds")


def complaint(capfd):
    """The one line on standard error; standard output is empty."""
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


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


def temporary_files_in(folder):
    """An environment whose temporary files go to a new folder of that name."""
    folder.mkdir()
    return {**os.environ, "TMPDIR": str(folder)}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_every_rank_and_leaves_no_folder(number, code, tmp_path, tmp_path_factory):
    environ = temporary_files_in(tmp_path_factory.mktemp("t") / "tmp")
    arguments = command("hangs", "run", "a.mp4", "--nproc", "2", "--out", str(tmp_path / "o"))
    process = subprocess.Popen(arguments, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "forever\n"
    ranks = [int(path.read_text()) for path in tmp_path.glob(".o.partial-*/pids/*")]
    assert len(ranks) == 2
    process.send_signal(number)
    sent = time.monotonic()
    assert process.wait(30) == code
    assert time.monotonic() - sent < 10
    assert process.stderr.read() == f"tokenring: stopped by {number.name}\n"
    assert list(tmp_path.iterdir()) == []
    assert [rank for rank in ranks if Path(f"/proc/{rank}").exists()] == []
    assert list(Path(environ["TMPDIR"]).iterdir()) == []


def test_a_signal_ends_a_ray_run_in_one_line_with_its_cluster(tmp_path):
    environ = temporary_files_in(tmp_path / "tmp")
    arguments = command("hangs", "run", "a.mp4", "--engine", "ray", "--nproc", "2", "--out", str(tmp_path / "o"))
    process = subprocess.Popen(arguments, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "forever\n"
    (driver,) = [
        words for words in command_lines() if "launch.engines.ray_driver" in words and str(process.pid) in words
    ]
    cluster = driver[driver.index("--cluster") + 1]
    assert any("raylet" in words[0] and cluster in " ".join(words) for words in command_lines())
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert process.stderr.read() == "tokenring: stopped by SIGINT\n"
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not Path(cluster).exists()
    assert [words for words in command_lines() if cluster in " ".join(words)] == []


def command_lines():
    """Of every living process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_bytes().decode(errors="replace").split("\0"))
    return found


def test_an_outside_torchrun_of_two_nodes_makes_the_command_a_rank(tmp_path):
    # The store of the two agents: a file would need no port, but torchrun's static rendezvous takes one.
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node)]
            + ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
            + ["--log-dir", str(tmp_path / f"agent-{node}")]
            + ["-m", ENTRIES, "adds", "run", "a.mp4", "--json", "--out", str(tmp_path / "o")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    (first, error), (second, _) = [node.communicate(timeout=600) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], error
    report = json.loads(first)
    assert second == ""
    assert (report["ranks"], report["engine"], report["generated_ids"]) == (2, "torchrun", [3, 0])
    assert report["bytes_sent"] == [[0, 7], [7, 0]]
    assert report["config"]["engine.nproc"] == {"value": 2, "from": "launcher torchrun"}
    assert json.loads((tmp_path / "o" / "report.json").read_text()) == report


def test_an_outside_mpirun_makes_the_command_a_rank_and_names_who_failed():
    from launch.engines.mpi import find_mpirun, options

    start = [find_mpirun(), *options(find_mpirun(), 3)]
    done = subprocess.run(
        [*start, *command("raises_on_2", "run", "a.mp4", "--quiet")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0
    assert done.stdout.strip() == ""
    assert "tokenring: rank 2 of 3: ValueError: frame 7 is bad, as said\n" in done.stderr


def test_flags_that_contradict_an_outside_launcher_are_refused(monkeypatch, capfd):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert discover().world == 4
    assert run("a.mp4", "--nproc", "2") == 2
    assert "4 ranks" in complaint(capfd)
    assert run("a.mp4", "--engine", "ray") == 2
    assert "--engine" in complaint(capfd)
    with pytest.raises(ConfigError, match="MASTER_ADDR and MASTER_PORT not"):
        join(discover(), device="cpu", timeout=5.0)


def test_help_is_there_in_a_second_and_loads_no_torch():
    code = "import sys, launch.cli; launch.cli.main(['run', '--help']); print('torch' in sys.modules)"
    started = time.process_time(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("False")
    assert "--max-new-tokens" in done.stdout
    assert "video." in done.stdout
    assert "video.." not in done.stdout
    assert time.monotonic() - started[1] < 5, "a bound for a loaded machine; idle it takes a quarter of a second"

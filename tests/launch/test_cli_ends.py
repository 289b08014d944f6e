"""The command beside others: signals that end it with all its ranks, launchers that started it as a rank."""

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from launch.engines.rendezvous import discover, join
from launch.errors import ConfigError
from tests.launch.command import ENTRIES, ROOT, command, complaint, ended, run, temporary_files_in

pytestmark = pytest.mark.usefixtures("importable_by_ranks")


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
    assert ended(process) == code
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
    assert ended(process) == 130
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

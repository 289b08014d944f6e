"""Three engines, one worker: the same records, the failing rank named, nobody left behind."""

import dataclasses
import os
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from launch import engines, worker
from launch.config import EngineConfig, GenerateConfig, RunConfig, VideoConfig
from launch.engines.base import Watch, supervise
from launch.engines.mpi import options
from launch.engines.rendezvous import discover, first_host
from launch.errors import EXIT_TIMED_OUT, ConfigError, Failure, first_failure, is_victim
from launch.progress import Relay
from launch.records import RankRecord

ROOT = Path(__file__).parents[2]
ENTRIES = "tests.launch.fake_entries"


@pytest.fixture(autouse=True)
def importable_by_ranks(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def start(name, entry, nproc, run_dir, sink=None, **engine):
    config = RunConfig(
        video=VideoConfig(paths=("none.mp4",)),
        generate=GenerateConfig(seed=11),
        engine=EngineConfig(name=name, nproc=nproc, **engine),
    )
    return engines.build(name).start(config, nproc, run_dir, f"{ENTRIES}:{entry}", sink=sink)


def test_only_another_thread_waits_inside_popen(monkeypatch, tmp_path):
    """A signal that raises there would leave its lock held, and the command would never end."""

    class Watched(subprocess.Popen):
        def wait(self, timeout=None):
            assert threading.current_thread() is not threading.main_thread()
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Watched)
    (tmp_path / "logs").mkdir()
    for words, limit in ((["true"], None), (["sleep", "60"], 0.3)):
        watch = Watch(limit, time.monotonic(), Relay(None))
        said = supervise(words, dict(os.environ), tmp_path, 1, watch)
        assert (said is None) == (limit is None)


def processes_of(run_dir):
    """Living processes whose command line names the run's folder."""
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run_dir).encode() in command.read_bytes():
                found.append(command.parent.name)
        except OSError:
            continue
    return found


def expected(rank, world):
    """What `fake_entries.adds` must come to, worked out here."""
    return RankRecord(
        rank=rank,
        world=world,
        schedule="ring",
        frames=2,
        tokens_before=512,
        tokens_after=51,
        tokens_local=10 + rank,
        cache_bytes=100 * (rank + 1),
        bytes_sent={(rank + 1) % world: 7},
        generated_ids=[sum(range(1, world + 1)), 11],
        text=f"sum {sum(range(1, world + 1))}",
        notes=["nothing was watched"],
    )


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster with three CPUs that the engine does not own; its address and where its temporary files go."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-") as folder:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("TMPDIR", folder)
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
        yield made.address, Path(folder)
        made.shutdown()


def check_records(outcome, world, said):
    assert outcome.failure is None, outcome.failure
    blank = {name: RankRecord.__dataclass_fields__[name].default for name in ("host", "peak_bytes")}
    blank |= {"hardware": {}, "seconds": {}, "events": []}
    assert [dataclasses.replace(record, **blank) for record in outcome.records] == [
        expected(rank, world) for rank in range(world)
    ]
    for record in outcome.records:
        assert list(record.seconds) == ["add"]
        assert record.peak_bytes > 0
    assert said == [{"stage": "add"}, {"done": 1, "total": 1}, {"line": "added"}]


@pytest.mark.parametrize(("name", "world"), [("torchrun", 3), ("mpi", 3), ("ray", 2)])
def test_every_engine_gives_the_same_records(name, world, tmp_path):
    said = []
    check_records(start(name, "adds", world, tmp_path, sink=said.append), world, said)
    assert "a library prints" in (tmp_path / "logs" / "rank-0.log").read_text()
    assert processes_of(tmp_path) == []


def test_ray_runs_on_a_given_cluster_and_leaves_it_usable(cluster, tmp_path):
    said = []
    address, temporary = cluster
    check_records(start("ray", "adds", 3, tmp_path / "a", sink=said.append, ray_address=address), 3, said)

    failed = start("ray", "raises_on_1_while_others_are_busy", 3, tmp_path / "b", ray_address=address)
    assert failed.failure.line == "rank 1 of 3: RuntimeError: lost"
    assert time.time() - failed.failure.time < 10

    full = start("ray", "adds", 4, tmp_path / "c", ray_address=address, ray_wait_seconds=1.0)
    assert "no room for bundle 3 (1 CPU) of 4" in full.failure.line
    assert "3 CPU free" in full.failure.line

    for seconds in (12.0, 60.0):  # a loaded machine may not get as far as the stage in the first
        out = tmp_path / f"hangs-{seconds}"
        late = start("ray", "hangs", 2, out, ray_address=address, timeout_seconds=seconds)
        assert "timed out: no result after" in late.failure.line
        if "stopped in stage" in late.failure.line:
            break
    assert "stopped in stage 'forever'" in late.failure.line
    assert (out / "logs" / "rank-1.log").exists()
    assert list(temporary.glob("tokenring-rank-*")) == []


def test_a_ray_address_where_nobody_listens_is_refused_at_once(tmp_path):
    for address in ("127.0.0.1:1", "nowhere"):
        with pytest.raises(ConfigError, match=address) as caught:
            start("ray", "adds", 2, tmp_path, ray_address=address)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["torchrun", "mpi"])
def test_all_ranks_end_soon_after_one_fails_even_when_they_do_not_look(name, tmp_path):
    outcome = start(name, "raises_on_1_while_others_are_busy", 3, tmp_path)
    assert time.time() - outcome.failure.time < 10
    assert outcome.failure.line == "rank 1 of 3: RuntimeError: lost"
    assert "in raises_on_1_while_others_are_busy" in outcome.failure.traceback
    assert outcome.records == ()
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize("name", ["torchrun", "mpi"])
def test_a_killed_rank_is_named_with_its_signal(name, tmp_path):
    outcome = start(name, "killed_on_1", 2, tmp_path)
    assert (outcome.failure.rank, outcome.failure.name) == (1, "SIGKILL")
    assert processes_of(tmp_path) == []


def test_a_run_that_takes_too_long_is_stopped(tmp_path):
    started = time.monotonic()
    outcome = start("torchrun", "hangs", 2, tmp_path, timeout_seconds=6.0)
    assert time.monotonic() - started < 6 + 10
    assert outcome.failure.exit_code == EXIT_TIMED_OUT
    assert "no result after 6 s, stopped" in outcome.failure.line
    assert processes_of(tmp_path) == []


def test_a_time_out_names_the_stage_it_came_in():
    relay = Relay(None)
    relay.feed(b'{"stage": "load"}\n{"stage": "enc')
    relay.feed(b'ode"}\n{"done": 1, "total": 2}\n')
    late = Watch(limit=2.0, started=time.monotonic() - 3, relay=relay)
    assert late.expired()
    assert "after 2 s, stopped in stage 'encode'" in late.timeout(4).line
    assert not Watch(limit=None, started=0.0, relay=relay).expired()


def test_an_entry_that_does_not_exist_is_named():
    for entry in (f"{ENTRIES}:no_such_function", ENTRIES):
        with pytest.raises(ConfigError, match=entry):
            worker.load(entry)


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, None),
        ({"WORLD_SIZE": "4"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, (5, 8, 1, 4, "torchrun")),
        (
            {f"OMPI_COMM_WORLD_{n}": v for n, v in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "2421")},
            (2, 4, 2, 1, "mpi"),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}, (1, 2, 0, 1, "mpi")),
        (
            {f"MV2_COMM_WORLD_{n}": v for n, v in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "1212")},
            (1, 2, 1, 2, "mpi"),
        ),
        (
            {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2"},
            (3, 4, 1, 2, "slurm"),
        ),
        # torchrun inside an mpirun that starts one agent a node: the two count different things, both rightly.
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
            | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            (3, 4, 1, 2, "torchrun"),
        ),
        # left over in the shell, right by chance for this rank
        (
            {"RANK": "1", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            (1, 2, 1, 2, "mpi"),
        ),
    ],
)
def test_a_rank_knows_its_place_from_the_environment(environ, place):
    found = discover(environ)
    assert (found and dataclasses.astuple(found)) == place


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (
            {"RANK": "3", "WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},
            ["RANK=3", "OMPI_COMM_WORLD_RANK=1", "unset"],
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "PMI_RANK": "0", "PMI_SIZE": "4"}, ["WORLD_SIZE=2", "PMI_SIZE=4"]),
        ({"RANK": "4", "WORLD_SIZE": "4"}, ["RANK=4", "0 to 3"]),
        ({"RANK": "x", "WORLD_SIZE": "4"}, ["RANK='x'"]),
    ],
)
def test_launchers_that_disagree_are_both_named(environ, words):
    with pytest.raises(ConfigError) as caught:
        discover(environ)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_first_host_of_a_slurm_list():
    assert [first_host(text) for text in ("n1", "n1,n2", "n[3-5,9]", "a-b[007]", "x[1-2],y")] == [
        "n1",
        "n1",
        "n3",
        "a-b007",
        "x1",
    ]


def test_a_root_with_few_cores_tells_open_mpi_so(tmp_path):
    fake = tmp_path / "mpirun"
    fake.write_text("#!/bin/sh\necho 'mpirun (Open MPI) 5.0.1'\n")
    fake.chmod(0o755)
    chosen = options(str(fake), 4096)
    assert "--oversubscribe" in chosen
    assert ("--allow-run-as-root" in chosen) is (os.geteuid() == 0)
    fake.write_text("#!/bin/sh\necho 'HYDRA build details'\n")
    assert options(str(fake), 4096) == ["-n", "4096"]


def failure(rank, kind, name, message="", when=0.0):
    return Failure(rank=rank, world=4, kind=kind, name=name, message=message, time=when)


def test_causes_come_before_victims_and_then_the_earliest():
    victim = failure(0, "exception", "RuntimeError", "[pair.cc] Connection closed by peer [127.0.0.1]", 1.0)
    stopped = failure(1, "signal", "SIGTERM", when=0.5)
    crash = failure(2, "signal", "SIGSEGV", when=3.0)
    raised = failure(3, "exception", "KeyError", "x", 4.0)
    assert first_failure([victim, stopped]) is victim
    assert first_failure([victim, stopped, crash]) is crash
    assert first_failure([victim, stopped, crash, raised]) is raised
    assert first_failure([dataclasses.replace(raised, time=5.0), raised]) is raised
    assert first_failure([]) is None
    assert [is_victim(f) for f in (victim, stopped, crash, raised)] == [True, True, False, False]

"""What every engine does: start ranks, watch them, end all of them soon after the first failure, collect what they left.

first failure seen ──SETTLE──► others had time to fail by themselves and say so ──► launcher told to stop
    ──STOP──► launcher killed, then every rank that still lives        (SETTLE + STOP well under 10 s)
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launch.config import RunConfig, to_json
from launch.errors import Failure, first_failure
from launch.output import write_atomic
from launch.progress import Relay, Sink
from launch.records import RankRecord

TICK_SECONDS = 0.1
LOOK_SECONDS = 0.02
SETTLE_SECONDS = 3.0
STOP_SECONDS = 3.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended: every rank's record, or the failure to name."""

    records: tuple[RankRecord, ...]
    failure: Failure | None


class Engine(Protocol):
    """Starts the worker `nproc` times."""

    name: str

    def start(
        self,
        config: RunConfig,
        nproc: int,
        run_dir: Path,
        entry: str,
        *,
        sink: Sink | None = None,
        started: float = 0.0,
    ) -> Outcome:
        """Run `entry` on `nproc` ranks and return when all of them have ended.

        Args:
            config: handed to every rank; `engine.timeout_seconds` bounds the run.
            nproc: number of ranks.
            run_dir: empty folder for records, failures and logs (`launch.worker` lists what comes there).
            entry: `module:function`, called as `function(config, group, log)` on each rank.
            sink: gets rank 0's progress messages.
            started: `time.monotonic()` from which the time-out counts; 0 means now.
        """
        ...


@dataclass
class Watch:
    """The time limit of a run and what is heard from it meanwhile."""

    limit: float | None
    started: float
    relay: Relay

    @classmethod
    def over(cls, config: RunConfig, sink: Sink | None, started: float) -> Watch:
        """A watch for a run of this configuration."""
        return cls(config.engine.timeout_seconds, started or time.monotonic(), Relay(sink))

    def expired(self) -> bool:
        """The run took longer than it may."""
        return self.limit is not None and time.monotonic() - self.started > self.limit

    def timeout(self, nproc: int) -> Failure:
        """The failure to report when `expired`."""
        stage = f" in stage {self.relay.stage!r}" if self.relay.stage else " before the first stage"
        message = f"no result after {self.limit:g} s, stopped{stage}; raise --timeout or do less"
        return Failure(rank=-1, world=nproc, kind="timeout", name="timed out", message=message, time=time.time())


def supervise(
    command: Sequence[str], environ: dict[str, str], run_dir: Path, nproc: int, watch: Watch
) -> Failure | None:
    """Run a launcher command until it ends, is told to end, or has to be ended; never returns while a rank lives.

    Returns:
        The time-out failure, or None when the launcher ended (well or not: the folder tells).
    """
    with (run_dir / "logs" / "launcher.log").open("ab") as output:
        process = subprocess.Popen(
            list(command), env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    # A signal raises wherever this thread is. Inside Popen's own waiting it could leave its lock held, and every later wait
    # would never return: another thread waits, this one only looks.
    threading.Thread(target=process.wait, daemon=True).start()
    try:
        return _wait(process, run_dir, nproc, watch)
    finally:
        _end(process, run_dir)
        watch.relay.poll(run_dir / "progress.jsonl")


def _wait(process: subprocess.Popen, run_dir: Path, nproc: int, watch: Watch) -> Failure | None:
    failed_at = None
    while True:
        if _ended(process, TICK_SECONDS):
            return None
        watch.relay.poll(run_dir / "progress.jsonl")
        if watch.expired():
            return watch.timeout(nproc)
        if failed_at is None and any((run_dir / "failures").glob("rank-*.json")):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > SETTLE_SECONDS:
            return None


def _ended(process: subprocess.Popen, seconds: float) -> bool:
    """Whether it ends within that time."""
    until = time.monotonic() + seconds
    while process.returncode is None and time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
    return process.returncode is not None


def _end(process: subprocess.Popen, run_dir: Path) -> None:
    """End the launcher, politely first, then whatever rank outlived it."""
    if process.returncode is None:
        process.terminate()
        _ended(process, STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    _ended(process, math.inf)
    for file in (run_dir / "pids").glob("*"):
        _kill_rank(int(file.read_text()), run_dir)


def _kill_rank(pid: int, run_dir: Path) -> None:
    """Kill a rank that outlived its launcher, and nobody who got its process number since."""
    command = Path(f"/proc/{pid}/cmdline")
    if Path("/proc/self/cmdline").exists():
        try:
            if os.fsencode(run_dir) not in command.read_bytes():
                return
        except OSError:
            return
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def prepare(config: RunConfig, run_dir: Path) -> None:
    """Put into the run folder what a worker expects there."""
    for name in ("logs", "records", "failures", "pids"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    write_atomic(run_dir / "config.json", to_json(config))


def child_environment(threads: int) -> dict[str, str]:
    """This process's environment without leftovers of another launcher, with the thread limit libraries read."""
    stale = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environ = {name: value for name, value in os.environ.items() if name not in stale}
    environ.update({"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"})
    return environ


def collect(run_dir: Path, nproc: int, unexplained: Callable[[list[int]], list[Failure]]) -> Outcome:
    """What the ranks left in the run folder.

    Args:
        unexplained: gets the ranks that left neither record nor failure; says what the launcher knows about them.
    """
    records = tuple(
        RankRecord.from_json(path.read_bytes()) for path in sorted((run_dir / "records").glob("rank-*.json"))
    )
    failures = [Failure(**json.loads(path.read_bytes())) for path in (run_dir / "failures").glob("rank-*.json")]
    silent = sorted(set(range(nproc)) - {record.rank for record in records} - {failure.rank for failure in failures})
    if silent:
        failures += unexplained(silent)
    if not failures:
        return Outcome(records, None)
    return Outcome((), first_failure(failures))


def died(rank: int, world: int, number: int, when: float = 0.0) -> Failure:
    """A rank that a signal ended before it could say anything."""
    name = signal.Signals(number).name if number in signal.Signals._value2member_map_ else f"signal {number}"
    hint = "killed; out of memory is the usual reason" if name == "SIGKILL" else "ended by this signal; see its log"
    return Failure(rank=rank, world=world, kind="signal", name=name, message=hint, time=when)


def vanished(rank: int, world: int, code: int | None = None) -> Failure:
    """A rank that ended without a record, a failure or a signal that the launcher reported."""
    how = "ended" if code is None else f"exited with code {code}"
    return Failure(rank=rank, world=world, kind="exit", name=how, message="without a result; see its log")

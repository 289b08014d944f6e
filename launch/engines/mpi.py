"""Ranks as processes that mpirun starts on this machine. MPI starts them and hands one address over; tensors go by gloo or NCCL.

`mpirun` comes from the environment this Python runs in (the `openmpi` package puts one there) or else from PATH: mpi4py
must find the library of the same installation. On several machines, start the command itself:
`mpirun --hostfile hosts python -m launch run ... --engine mpi`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from launch import worker
from launch.config import RunConfig
from launch.engines.base import Outcome, Watch, child_environment, collect, died, prepare, supervise, vanished
from launch.engines.rendezvous import Place
from launch.errors import ConfigError, Failure
from launch.progress import Sink


class Mpi:
    """The engine behind `--engine mpi`."""

    name = "mpi"

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
        """See `launch.engines.base.Engine.start`."""
        watch = Watch.over(config, sink, started)
        program = find_mpirun()
        prepare(config, run_dir)
        command = [program, *options(program, nproc), sys.executable, "-u", "-m", "launch.worker", str(run_dir), entry]
        environ = child_environment(worker.threads(config, Place(0, nproc, 0, nproc, self.name)))
        timed_out = supervise([*command, "--parent", str(os.getpid())], environ, run_dir, nproc, watch)
        if timed_out is not None:
            return Outcome((), timed_out)
        return collect(run_dir, nproc, lambda silent: _said_by_mpirun(run_dir, nproc, silent))


def find_mpirun() -> str:
    """The mpirun of this environment, or of PATH. Raises ConfigError with the remedy when there is none."""
    try:
        import mpi4py  # noqa: F401
    except ImportError:
        raise ConfigError("--engine mpi needs mpi4py; install the extra `mpi` or use --engine torchrun") from None
    beside = Path(sys.prefix) / "bin" / "mpirun"
    program = str(beside) if beside.exists() else shutil.which("mpirun")
    if program is None:
        raise ConfigError("--engine mpi needs mpirun; install the package `openmpi` or use --engine torchrun")
    return program


def options(program: str, nproc: int) -> list[str]:
    """Arguments for `nproc` ranks on this machine; Open MPI alone must be told about root and about few cores."""
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    if "Open MPI" not in version:
        return ["-n", str(nproc)]
    chosen = ["-n", str(nproc), "--bind-to", "none"]
    if os.geteuid() == 0:
        chosen.append("--allow-run-as-root")
    if nproc > worker.cores():
        chosen.append("--oversubscribe")
    return chosen


def _said_by_mpirun(run_dir: Path, nproc: int, silent: list[int]) -> list[Failure]:
    """What mpirun printed about ranks that said nothing themselves; it names the first one that a signal ended."""
    text = (run_dir / "logs" / "launcher.log").read_text(encoding="utf-8", errors="replace")
    for match in re.finditer(r"process rank (\d+) [^-]*?signal (\d+)", text):
        if int(match.group(1)) in silent:
            return [died(int(match.group(1)), nproc, int(match.group(2)))]
    tail = [line.strip() for line in text.splitlines() if line.strip(" -")]
    failure = vanished(silent[0], nproc)
    if len(silent) == nproc and tail:
        message = f"mpirun started no rank: {' '.join(tail)[:300]}"
        return [Failure(rank=-1, world=nproc, kind="exit", name="mpirun failed", message=message)]
    return [failure]

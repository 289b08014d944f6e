"""Ranks as processes of this machine under torch's elastic agent.

    tokenring run ─► python -m launch.engines.torchrun (agent) ─► python -m launch.worker  x nproc

The agent is torch's public `elastic_launch`; it is a process of its own so that it can be ended as a whole. It hosts the
store of the ranks on the loopback interface and leaves in `agent.json` how each failed rank ended, which is the only word
of a rank that was killed. No restarts: half a run's result is of no use.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import uuid
from pathlib import Path

from launch import worker
from launch.config import RunConfig
from launch.engines.base import Outcome, Watch, child_environment, collect, died, prepare, supervise, vanished
from launch.engines.rendezvous import Place, host_store
from launch.errors import Failure
from launch.output import write_atomic
from launch.progress import Sink

START_SECONDS = 300.0
AGENT = "agent"
"""Folder inside the run's, for what the agent itself writes; it would make one among the temporary files and leave it."""


class Torchrun:
    """The default engine."""

    name = "torchrun"

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
        prepare(config, run_dir)
        command = [sys.executable, "-m", "launch.engines.torchrun", str(run_dir), entry, str(nproc)]
        environ = child_environment(worker.threads(config, Place(0, nproc, 0, nproc, self.name)))
        try:
            timed_out = supervise(command, environ, run_dir, nproc, watch)
        finally:
            shutil.rmtree(run_dir / AGENT, ignore_errors=True)
        if timed_out is not None:
            return Outcome((), timed_out)
        return collect(run_dir, nproc, lambda silent: _said_by_agent(run_dir, nproc, silent))


def _said_by_agent(run_dir: Path, nproc: int, silent: list[int]) -> list[Failure]:
    """What the agent saw of ranks that said nothing themselves."""
    path = run_dir / "agent.json"
    seen = {int(rank): how for rank, how in json.loads(path.read_bytes()).items()} if path.exists() else {}
    failures = []
    for rank in silent:
        code = seen.get(rank, {}).get("exit_code")
        if code is not None and code < 0:
            failures.append(died(rank, nproc, -code, seen[rank]["time"]))
        elif code is not None or not seen:
            failures.append(vanished(rank, nproc, code))
    return failures


def main(argv: list[str] | None = None) -> int:
    """The agent process: start `nproc` workers, wait, leave `agent.json` when any failed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    parser = argparse.ArgumentParser(prog="python -m launch.engines.torchrun")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("entry")
    parser.add_argument("nproc", type=int)
    options = parser.parse_args(argv)
    store = host_store(options.nproc, START_SECONDS)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=options.nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        # A file store: agents of one machine need no port to meet.
        rdzv_endpoint=str(options.run_dir / "rendezvous"),
        rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(options.run_dir / AGENT)),
    )
    address = f"127.0.0.1:{store.port}"
    arguments = ["-u", "-m", "launch.worker", str(options.run_dir), options.entry, "--store", address]

    try:
        elastic_launch(launch, sys.executable)(*arguments, "--parent", str(os.getppid()))
    except ChildFailedError as error:
        how = {
            rank: {"exit_code": failure.exitcode, "time": float(failure.timestamp or time.time())}
            for rank, failure in error.failures.items()
        }
        write_atomic(options.run_dir / "agent.json", json.dumps(how))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Ranks as Ray actors: a cluster started on this machine for the run, or one that is already there.

    tokenring run ─► python -m launch.engines.ray_driver ─► one actor a rank      (ray_driver.py, ray_actor.py)

Ray carries the configuration, one address, progress text and records (JSON text); tensors go from rank to rank by gloo or
NCCL. Ray has a process of its own because it takes signals for itself and writes to standard error from many places: what
it prints is in `logs/launcher.log`, and a cluster of the run ends with that process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
from contextlib import nullcontext
from pathlib import Path

from launch import worker
from launch.config import RunConfig
from launch.engines.base import Outcome, Watch, child_environment, collect, prepare, supervise
from launch.engines.ray_driver import DRIVER_JSON, NoCluster, blameless
from launch.engines.rendezvous import Place
from launch.errors import ConfigError, Failure, one_line
from launch.output import Scratch
from launch.progress import Sink

HELLO_SECONDS = 10.0
SHORT = Path("/tmp")
"""Ray keeps sockets in its folder, whose names may have 107 characters at most."""


class Ray:
    """The engine behind `--engine ray`."""

    name = "ray"

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
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("--engine ray needs ray; install the extra `ray` or use --engine torchrun")
        watch = Watch.over(config, sink, started)
        own = config.engine.ray_address is None
        if not own:
            _check_answers(config.engine.ray_address)
        prepare(config, run_dir)
        command = [sys.executable, "-m", "launch.engines.ray_driver", str(run_dir), entry, str(nproc)]
        command += ["--parent", str(os.getpid())]
        environ = child_environment(worker.threads(config, Place(0, nproc, 0, nproc, self.name)))
        with Scratch("tr-ray-", SHORT if SHORT.is_dir() else None) if own else nullcontext() as scratch:
            if scratch is not None:
                command += ["--cluster", str(scratch.path)]
            timed_out = supervise(command, environ, run_dir, nproc, watch)
        if timed_out is not None:
            return Outcome((), timed_out)
        outcome = collect(run_dir, nproc, lambda silent: _said_by_driver(run_dir, nproc))
        if outcome.failure is not None and outcome.failure.name == NoCluster.__name__:
            raise _no_cluster(config.engine.ray_address, outcome.failure.message)
        return outcome


def _said_by_driver(run_dir: Path, nproc: int) -> list[Failure]:
    """Why ranks said nothing: what the driver left, or else the end of what it printed."""
    path = run_dir / DRIVER_JSON
    if path.exists():
        return [Failure(**json.loads(path.read_bytes()))]
    if any((run_dir / "failures").glob("rank-*.json")):
        return []
    text = (run_dir / "logs" / "launcher.log").read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return [blameless(nproc, "ray ended", one_line(lines[-1], 300) if lines else "without a word")]


def _check_answers(address: str) -> None:
    """Fail within seconds where nobody listens; Ray itself would try for many minutes."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdigit():
        raise ConfigError(f"engine.ray_address is {address!r}: give host:port of the cluster's head, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=HELLO_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, one_line(error, 160)) from None


def _no_cluster(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"engine.ray_address is {address!r}: no cluster answers there ({why}); "
        f"start one with `ray start --head`, or leave it out"
    )

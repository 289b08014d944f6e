"""The process that drives Ray: `python -m launch.engines.ray_driver RUN_DIR ENTRY NPROC --parent PID`.

    driver ── placement group (one bundle a rank) ── one actor a bundle
       rank 0's actor ── host:port of the store ──► driver ──► every actor joins

It leaves records, failures, logs and progress in RUN_DIR as ranks of the other engines do, and `driver.json` where no rank is
to blame. A signal only raises a flag here: an exception raised inside Ray's own code would come out as something else.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launch import worker
from launch.config import RunConfig, from_json, to_json
from launch.engines.base import SETTLE_SECONDS, TICK_SECONDS
from launch.engines.ray_actor import RankActor
from launch.engines.rendezvous import Place
from launch.errors import Failure, one_line
from launch.output import write_atomic

ACTOR_SECONDS = 120.0
LOG_SECONDS = 1.5
DRIVER_JSON = "driver.json"


class Stop:
    """True once a signal asked this process to end, or the command that started it is gone."""

    def __init__(self, parent: int):
        self._parent, self._asked = parent, False
        self.listen()

    def listen(self) -> None:
        """Take SIGTERM."""
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def __call__(self) -> bool:
        return self._asked or os.getppid() != self._parent


class Stopped(Exception):
    """`Stop` said so."""


class NoCluster(ConnectionError):
    """The given address has no cluster that answers."""


def connect(ray: Any, config: RunConfig, nproc: int, folder: str | None) -> None:
    """Join the given cluster, or start one with room for every rank that keeps its files in `folder`."""
    silent = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if folder is None:
        try:
            ray.init(address=config.engine.ray_address, **silent)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise NoCluster(one_line(error, 160)) from error
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    room = max(nproc, worker.cores())
    # No dashboard: its job interface has no password.
    ray.init(address="local", num_cpus=room, include_dashboard=False, _temp_dir=folder, **silent)


class Session:
    """One run on a connected cluster."""

    def __init__(self, ray: Any, config: RunConfig, nproc: int, run_dir: Path, stop: Stop, folder: str | None):
        self.ray, self.config, self.nproc, self.run_dir = ray, config, nproc, run_dir
        self.stop, self.folder = stop, folder
        self.group: Any = None
        self.actors: list[Any] = []
        self.heard = 0
        self._asked: Any = None

    def run(self, entry: str) -> Failure | None:
        """Place the actors, run the worker in each, gather what they left; nothing of it outlives the call.

        Raises `Stopped`; gives the failure where no rank is to blame.
        """
        try:
            failure = self._place()
            if failure is None:
                self._keep(self._work(entry))
            return failure
        finally:
            self._save_logs()
            for actor in self.actors:
                with suppress(Exception):
                    self.ray.kill(actor)
            if self.group is not None:
                self.ray.util.remove_placement_group(self.group)

    def _place(self) -> Failure | None:
        """One bundle and one actor a rank; the failure when the cluster has no room for them."""
        use_gpu = self._use_gpu()
        bundle = {"GPU": 1, "CPU": 1} if use_gpu else {"CPU": 1}
        self.group = self.ray.util.placement_group([bundle] * self.nproc, strategy=self.config.engine.ray_strategy)
        wait = self.config.engine.ray_wait_seconds
        deadline = time.monotonic() + wait
        while not self.group.wait(TICK_SECONDS):
            self._obey()
            if time.monotonic() > deadline:
                return self._no_room(bundle, wait)
        strategy = self.ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        remote = self.ray.remote(RankActor)
        config = replace(self.config, engine=replace(self.config.engine, device="cuda" if use_gpu else "cpu"))
        for rank in range(self.nproc):
            place = strategy(self.group, placement_group_bundle_index=rank)
            options = {"num_cpus": 1, "num_gpus": int(use_gpu), "scheduling_strategy": place, "max_concurrency": 2}
            self.actors.append(remote.options(**options).remote(to_json(config), self.folder))
        return None

    def _use_gpu(self) -> bool:
        """Whether ranks get a GPU each; asked for, or `auto` on a cluster that has enough of them."""
        requested = self.config.engine.device
        enough = self.ray.cluster_resources().get("GPU", 0) >= self.nproc
        return requested == "cuda" or (requested == "auto" and enough)

    def _no_room(self, bundle: dict[str, int], wait: float) -> Failure:
        """Which bundle the cluster cannot hold."""
        free = self.ray.available_resources()
        kind = "GPU" if "GPU" in bundle else "CPU"
        fits = int(free.get(kind, 0))
        need = " and ".join(f"{amount} {name}" for name, amount in bundle.items())
        message = (
            f"no room for bundle {min(fits, self.nproc - 1)} ({need}) of {self.nproc} after {wait:g} s: the cluster has "
            f"{fits} {kind} free; lower --nproc, add nodes, or raise engine.ray_wait_seconds"
        )
        return blameless(self.nproc, "placement failed", message)

    def _work(self, entry: str) -> dict[int, tuple[str, str]]:
        """Answers by rank, until all are there or SETTLE_SECONDS after the first failure."""
        nodes = self._get([actor.node.remote() for actor in self.actors])
        local = len(set(nodes)) == 1
        (address,) = self._get([self.actors[0].host.remote(self.nproc, local)])
        runs = {}
        for rank, actor in enumerate(self.actors):
            same = [other for other in range(self.nproc) if nodes[other] == nodes[rank]]
            place = Place(rank, self.nproc, same.index(rank), len(same), "ray")
            runs[actor.run.remote(entry, asdict(place), address)] = rank
        answers: dict[int, tuple[str, str]] = {}
        failed_at = None
        pending = list(runs)
        while pending:
            self._obey()
            done, pending = self.ray.wait(pending, num_returns=1, timeout=TICK_SECONDS)
            for reference in done:
                answers[runs[reference]] = self._answer(reference, runs[reference])
            self._relay()
            if failed_at is None and any(kind == "failure" for kind, _ in answers.values()):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > SETTLE_SECONDS:
                break
        self._relay(LOG_SECONDS)
        return answers

    def _obey(self) -> None:
        if self.stop():
            raise Stopped

    def _get(self, references: list[Any]) -> list[Any]:
        """Their values, soon enough to be told to stop in between."""
        deadline = time.monotonic() + ACTOR_SECONDS
        while self.ray.wait(references, num_returns=len(references), timeout=TICK_SECONDS)[1]:
            self._obey()
            if time.monotonic() > deadline:
                raise self.ray.exceptions.GetTimeoutError(f"an actor did not start within {ACTOR_SECONDS:g} s")
        return self.ray.get(references)

    def _answer(self, reference: Any, rank: int) -> tuple[str, str]:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayActorError:
            message = "its process was killed or crashed; out of memory is the usual reason"
            failure = Failure(
                rank=rank, world=self.nproc, kind="signal", name="died", message=message, time=time.time()
            )
            return "failure", json.dumps(asdict(failure))

    def _relay(self, seconds: float = 0.0) -> None:
        """Pass on what rank 0 said, if its answer is there within `seconds`; else it is looked for the next time."""
        if self._asked is None or seconds:
            self._asked = self.actors[0].progress.remote(self.heard)
        if not self.ray.wait([self._asked], timeout=seconds)[0]:
            return
        with suppress(self.ray.exceptions.RayError), (self.run_dir / "progress.jsonl").open("ab") as file:
            said = self.ray.get(self._asked)
            self.heard += len(said)
            file.write(said)
        self._asked = None

    def _keep(self, answers: dict[int, tuple[str, str]]) -> None:
        """Records, or the failures where there is one: half a run's records are of no use."""
        failed = any(kind == "failure" for kind, _ in answers.values())
        for rank, (kind, text) in answers.items():
            if failed == (kind == "failure"):
                write_atomic(self.run_dir / f"{kind}s" / f"rank-{rank}.json", text)

    def _save_logs(self) -> None:
        """Logs of the ranks that can still answer; with them go their folders."""
        asked = {actor.finish.remote(): rank for rank, actor in enumerate(self.actors)}
        if not asked:
            return
        for reference in self.ray.wait(list(asked), num_returns=len(asked), timeout=LOG_SECONDS)[0]:
            with suppress(self.ray.exceptions.RayError):
                write_atomic(self.run_dir / "logs" / f"rank-{asked[reference]}.log", self.ray.get(reference))


def blameless(nproc: int, name: str, message: str) -> Failure:
    """A failure that is no rank's."""
    return Failure(rank=-1, world=nproc, kind="exit", name=name, message=message, time=time.time())


def main(argv: list[str] | None = None) -> int:
    """Drive one run."""
    parser = argparse.ArgumentParser(prog="python -m launch.engines.ray_driver")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("entry")
    parser.add_argument("nproc", type=int)
    parser.add_argument("--parent", type=int, required=True, help="process to live no longer than")
    parser.add_argument("--cluster", help="start a cluster that keeps its files in this folder")
    options = parser.parse_args(argv)
    import ray

    stop = Stop(options.parent)
    config = from_json((options.run_dir / "config.json").read_text(encoding="utf-8"))
    try:
        connect(ray, config, options.nproc, options.cluster)
        stop.listen()  # Ray takes the signal for itself when it connects
        failure = Session(ray, config, options.nproc, options.run_dir, stop, options.cluster).run(options.entry)
    except Stopped:
        return 1
    except (NoCluster, ray.exceptions.RayError) as error:
        failure = blameless(options.nproc, type(error).__name__, one_line(error))
    finally:
        ray.shutdown()
    if failure is not None:
        write_atomic(options.run_dir / DRIVER_JSON, json.dumps(asdict(failure)))
    return int(failure is not None)


if __name__ == "__main__":
    sys.exit(main())

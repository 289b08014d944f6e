"""Ranks as Ray actors: a cluster started on this machine for the run, or one that is already there.

    driver ── placement group (one bundle a rank) ── one actor a bundle
       rank 0's actor ── host:port of the store ──► driver ──► every actor joins

Ray carries the configuration, that address, progress text and records (JSON text); tensors go from rank to rank by gloo
or NCCL. No dashboard is started (its job interface has no password), and nothing Ray prints reaches standard output.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launch import worker
from launch.config import RunConfig, from_json, to_json
from launch.engines.base import SETTLE_SECONDS, TICK_SECONDS, Outcome, Watch, prepare
from launch.engines.rendezvous import LOOPBACK, Place, host_store, own_address
from launch.errors import ConfigError, Failure, first_failure, one_line
from launch.output import write_atomic
from launch.progress import Sink
from launch.records import RankRecord

HELLO_SECONDS = 10.0
ACTOR_SECONDS = 120.0


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
        try:
            import ray
        except ImportError:
            raise ConfigError("--engine ray needs ray; install the extra `ray` or use --engine torchrun") from None
        watch = Watch.over(config, sink, started)
        prepare(config, run_dir)
        temporary = _connect(ray, config, nproc)
        try:
            return _Session(ray, config, nproc, run_dir, watch).run(entry)
        except ray.exceptions.RayError as error:
            return Outcome((), _failure(nproc, type(error).__name__, one_line(error)))
        finally:
            ray.shutdown()
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


def _connect(ray: Any, config: RunConfig, nproc: int) -> Path | None:
    """Join the given cluster, or start one with room for every rank; gives the folder to remove afterwards."""
    silent = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if config.engine.ray_address is not None:
        _check_answers(config.engine.ray_address)
        try:
            ray.init(address=config.engine.ray_address, **silent)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _no_cluster(config.engine.ray_address, error) from None
        return None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A short path: Ray keeps sockets in it, whose names may have 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="tr-ray-", dir="/tmp" if Path("/tmp").is_dir() else None))
    room = max(nproc, worker.cores())
    ray.init(address="local", num_cpus=room, include_dashboard=False, _temp_dir=str(folder), **silent)
    return folder


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
        raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"engine.ray_address is {address!r}: no cluster answers there ({one_line(error, 160)}); "
        f"start one with `ray start --head`, or leave it out"
    )


class RankActor:
    """What runs inside an actor; two of its methods may run at once, so progress can be read while the rank works."""

    def __init__(self, config: str):
        self.folder = Path(tempfile.mkdtemp(prefix="tokenring-rank-"))
        self.config = from_json(config)
        self.store: Any = None
        prepare(self.config, self.folder)
        worker.redirect_output(self.folder / "logs" / "rank.log")

    def node(self) -> str:
        """The Ray node this actor is on."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def host(self, world: int, local: bool) -> str:
        """Host the store of the ranks; gives its address."""
        limit = self.config.engine.exchange_timeout_seconds
        self.store = host_store(world, limit, LOOPBACK if local else own_address())
        return f"{self.store.host}:{self.store.port}"

    def run(self, entry: str, place: dict[str, Any], address: str) -> tuple[str, str]:
        """("record" or "failure", JSON text). A failure is an answer here, so that Ray does not wrap it."""
        rank = place["rank"]
        try:
            worker.run_in(self.folder, entry, Place(**place), address)
        except BaseException:
            traceback.print_exc()
            return "failure", (self.folder / "failures" / f"rank-{rank}.json").read_text(encoding="utf-8")
        return "record", (self.folder / "records" / f"rank-{rank}.json").read_text(encoding="utf-8")

    def progress(self, offset: int) -> bytes:
        """What rank 0 said since byte `offset`."""
        with suppress(FileNotFoundError), (self.folder / "progress.jsonl").open("rb") as file:
            file.seek(offset)
            return file.read()
        return b""

    def finish(self) -> bytes:
        """The log of this rank; its folder goes."""
        sys.stdout.flush()
        sys.stderr.flush()
        log = (self.folder / "logs" / "rank.log").read_bytes()
        shutil.rmtree(self.folder, ignore_errors=True)
        return log


class _Session:
    """One run on a connected cluster."""

    def __init__(self, ray: Any, config: RunConfig, nproc: int, run_dir: Path, watch: Watch):
        self.ray, self.config, self.nproc, self.run_dir, self.watch = ray, config, nproc, run_dir, watch
        self.group: Any = None
        self.actors: list[Any] = []

    def run(self, entry: str) -> Outcome:
        """Place the actors, run the worker in each, gather what they left; nothing of it outlives the call."""
        try:
            failure = self._place()
            if failure is not None:
                return Outcome((), failure)
            return self._work(entry)
        finally:
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
            if self.watch.expired():
                return self.watch.timeout(self.nproc)
            if time.monotonic() > deadline:
                return self._no_room(bundle, wait)
        strategy = self.ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        remote = self.ray.remote(RankActor)
        config = replace(self.config, engine=replace(self.config.engine, device="cuda" if use_gpu else "cpu"))
        for rank in range(self.nproc):
            place = strategy(self.group, placement_group_bundle_index=rank)
            options = {"num_cpus": 1, "num_gpus": int(use_gpu), "scheduling_strategy": place, "max_concurrency": 2}
            self.actors.append(remote.options(**options).remote(to_json(config)))
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
        return _failure(self.nproc, "placement failed", message)

    def _work(self, entry: str) -> Outcome:
        nodes = self.ray.get([actor.node.remote() for actor in self.actors], timeout=ACTOR_SECONDS)
        local = len(set(nodes)) == 1
        address = self.ray.get(self.actors[0].host.remote(self.nproc, local), timeout=ACTOR_SECONDS)
        runs = {}
        for rank, actor in enumerate(self.actors):
            same = [other for other in range(self.nproc) if nodes[other] == nodes[rank]]
            place = Place(rank, self.nproc, same.index(rank), len(same), "ray")
            runs[actor.run.remote(entry, asdict(place), address)] = rank
        answers, timed_out = self._wait(runs)
        self._save_logs(answers)
        if timed_out is not None:
            return Outcome((), timed_out)
        failures = [Failure(**json.loads(text)) for kind, text in answers.values() if kind == "failure"]
        if failures:
            return Outcome((), first_failure(failures))
        records = {rank: text for rank, (kind, text) in answers.items() if kind == "record"}
        for rank, text in records.items():
            write_atomic(self.run_dir / "records" / f"rank-{rank}.json", text)
        return Outcome(tuple(RankRecord.from_json(records[rank]) for rank in sorted(records)), None)

    def _wait(self, runs: dict[Any, int]) -> tuple[dict[int, tuple[str, str]], Failure | None]:
        """Answers by rank, until all are there or SETTLE_SECONDS after the first failure, or the time-out."""
        answers: dict[int, tuple[str, str]] = {}
        failed_at = None
        pending = list(runs)
        while pending:
            done, pending = self.ray.wait(pending, num_returns=1, timeout=TICK_SECONDS)
            for reference in done:
                answers[runs[reference]] = self._answer(reference, runs[reference])
            self._relay()
            if failed_at is None and any(kind == "failure" for kind, _ in answers.values()):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > SETTLE_SECONDS:
                break
            if self.watch.expired():
                return answers, self.watch.timeout(self.nproc)
        return answers, None

    def _answer(self, reference: Any, rank: int) -> tuple[str, str]:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayActorError:
            message = "its process was killed or crashed; out of memory is the usual reason"
            failure = Failure(
                rank=rank, world=self.nproc, kind="signal", name="died", message=message, time=time.time()
            )
            return "failure", json.dumps(asdict(failure))

    def _relay(self) -> None:
        with suppress(self.ray.exceptions.RayError):
            first = self.actors[0].progress.remote(self.watch.relay.offset)
            self.watch.relay.feed(self.ray.get(first, timeout=5))

    def _save_logs(self, answers: dict[int, tuple[str, str]]) -> None:
        """Logs of the ranks that can still answer."""
        asked = {rank: self.actors[rank].finish.remote() for rank in answers}
        for rank, reference in asked.items():
            with suppress(self.ray.exceptions.RayError):
                write_atomic(self.run_dir / "logs" / f"rank-{rank}.log", self.ray.get(reference, timeout=5))


def _failure(nproc: int, name: str, message: str) -> Failure:
    return Failure(rank=-1, world=nproc, kind="exit", name=name, message=message, time=time.time())

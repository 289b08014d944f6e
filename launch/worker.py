"""One rank: join the others, run the pipeline, hand back a record or say how it failed. The same for every engine.

An engine starts `python -m launch.worker RUN_DIR ENTRY` on each rank (Ray calls `work` inside its actors, an outside
launcher inside the command itself). In RUN_DIR the worker finds `config.json` and leaves

    records/rank-<r>.json     its record, complete or not there
    failures/rank-<r>.json    or how it failed
    logs/rank-<r>.log         everything it and its libraries printed
    pids/<r>                  its process number, for the engine to end it
    progress.jsonl            rank 0: what it is doing
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import platform
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config import RunConfig, from_json
from launch.engines.rendezvous import Place, discover, join
from launch.errors import EXIT_FAILED, EXIT_OK, ConfigError, Failure, one_line
from launch.output import write_atomic
from launch.progress import FileSink, Log, Sink
from launch.records import RankRecord

if TYPE_CHECKING:
    import torch.distributed as dist

DEFAULT_ENTRY = "launch.pipeline:run"
LEASH_SECONDS = 0.5


def load(entry: str) -> Callable[..., Any]:
    """The function that `module:function` names."""
    module, colon, name = entry.partition(":")
    try:
        if colon:
            return getattr(importlib.import_module(module), name)
    except AttributeError:
        pass
    raise ConfigError(f"entry {entry!r}: expected module:function of something that exists, such as {DEFAULT_ENTRY}")


@contextmanager
def joined(
    config: RunConfig, place: Place, address: str | None = None
) -> Iterator[tuple[RunConfig, dist.ProcessGroup]]:
    """Join the process group; gives it with the configuration whose `engine.device` is settled (never `auto`)."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads(config, place))
    device = settle_device(config.engine.device, place)
    if device == "cuda":
        torch.cuda.set_device(place.local_rank if torch.cuda.device_count() > 1 else 0)
    group = join(place, device=device, timeout=config.engine.exchange_timeout_seconds, address=address)
    yield replace(config, engine=replace(config.engine, device=device)), group
    # Reached only when the body succeeded: after a failure the peers may be gone, and NCCL would wait for them. Nobody
    # leaves early, since a closing rank can cut off what another has not read yet.
    dist.barrier(group=group)
    dist.destroy_process_group()


def work(config: RunConfig, entry: str, place: Place, group: dist.ProcessGroup, sink: Sink | None = None) -> RankRecord:
    """Run `entry(config, group, log)` and complete what it returns.

    The clock of `log` starts when all ranks have met. Where the entry leaves `seconds`, `events` or `peak_bytes` empty, the
    stage times of the log and the high-water mark of the process stand in.
    """
    import torch.distributed as dist

    dist.barrier(group=group)
    log = Log(sink, time.perf_counter())
    result = RankRecord.of(load(entry)(config, group, log))
    log.close()
    return replace(
        result,
        rank=place.rank,
        world=place.world,
        host=socket.gethostname(),
        hardware=hardware(config.engine.device),
        seconds=result.seconds or log.seconds_per_stage(),
        events=result.events or log.stage_events(),
        peak_bytes=result.peak_bytes or peak_resident_bytes(),
    )


def failure_of(error: BaseException, place: Place) -> Failure:
    """How this rank failed, from the exception that ended it."""
    return Failure(
        rank=place.rank,
        world=place.world,
        kind="exception",
        name=type(error).__name__,
        message=one_line(error),
        traceback="".join(traceback.format_exception(error)),
        host=socket.gethostname(),
        time=time.time(),
        bad_input=is_bad_input(error),
    )


def is_bad_input(error: BaseException) -> bool:
    """The input was at fault, as a truncated video is, which no check before the start can see."""
    if isinstance(error, ConfigError):
        return True
    from launch.video import VideoError

    return isinstance(error, VideoError)


def settle_device(requested: str, place: Place) -> str:
    """cpu or cuda. Raises ConfigError where cuda is asked for and a rank would have none."""
    if requested == "cpu":
        return "cpu"
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # Ray shows each actor its own device only, which is then device 0 of one.
    needed = 1 if place.source == "ray" else place.local_world
    if requested == "cuda" and count < needed:
        mend = "lower --nproc or give --device cpu" if count else "give --device cpu"
        raise ConfigError(
            f"engine.device is 'cuda' but {socket.gethostname()} has {count} CUDA devices that torch can use, for {needed} "
            f"ranks: {mend}"
        )
    return "cuda" if count >= needed else "cpu"


def threads(config: RunConfig, place: Place) -> int:
    """CPU threads of one rank: as configured, or the cores of the machine divided by its ranks."""
    return config.engine.threads or max(1, cores() // place.local_world)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(device: str) -> dict[str, Any]:
    """What this machine is, as far as a report should say."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_resident_bytes() -> int:
    """High-water mark of this process's resident set."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_in(run_dir: Path, entry: str, place: Place, address: str | None = None) -> None:
    """Do this rank's part and leave its record, or its failure, in `run_dir`. Raises what the entry raised."""
    try:
        config = from_json((run_dir / "config.json").read_text(encoding="utf-8"))
        sink = FileSink(run_dir / "progress.jsonl") if place.rank == 0 else None
        with joined(config, place, address) as (settled, group):
            record = work(settled, entry, place, group, sink)
            write_atomic(run_dir / "records" / f"rank-{place.rank}.json", record.to_json())
    except BaseException as error:
        failure = failure_of(error, place)
        write_atomic(run_dir / "failures" / f"rank-{place.rank}.json", json.dumps(asdict(failure)))
        raise


def redirect_output(path: Path) -> None:
    """Send everything this process prints, C libraries included, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()


def _hold_leash(parent: int) -> None:
    """End this process when the command that started the run is gone, even if it was killed."""

    def watch() -> None:
        while True:
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                os._exit(EXIT_FAILED)
            time.sleep(LEASH_SECONDS)

    threading.Thread(target=watch, daemon=True, name="leash").start()


def main(argv: list[str] | None = None) -> int:
    """What an engine starts on each rank of one machine."""
    parser = argparse.ArgumentParser(prog="python -m launch.worker")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("entry")
    parser.add_argument("--store", help="host:port of the store, when the engine hosts it")
    parser.add_argument("--parent", type=int, required=True, help="process to live no longer than")
    options = parser.parse_args(argv)
    place = discover()
    if place is None:
        raise ConfigError("launch.worker is started by an engine; use `tokenring run`")
    redirect_output(options.run_dir / "logs" / f"rank-{place.rank}.log")
    card = options.run_dir / "pids" / str(place.rank)
    write_atomic(card, str(os.getpid()))
    _hold_leash(options.parent)
    try:
        run_in(options.run_dir, options.entry, place, options.store)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        card.unlink(missing_ok=True)
        # No orderly end: exit handlers of MPI or NCCL would wait for ranks that are failing as well.
        os._exit(EXIT_FAILED)
    card.unlink(missing_ok=True)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())

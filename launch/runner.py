"""One run from a configuration to a report: check, start the ranks, merge what they hand back, write the folder.

run(config)            starts ranks through the engine of the configuration
run_as_rank(config)    this process was started as a rank by an outside launcher (torchrun, mpirun, srun)
"""

from __future__ import annotations

import importlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import engines, settings, worker
from launch.config import RunConfig
from launch.engines.rendezvous import Place
from launch.errors import ConfigError, Failure, RunFailed, one_line
from launch.output import MADE_BY, MARK, RunFolder, check_target, write_atomic
from launch.progress import Sink
from launch.records import RankRecord, merge
from launch.report import as_text

if TYPE_CHECKING:
    import torch.distributed as dist

REPORT_JSON = "report.json"
REPORT_TEXT = "report.txt"
RANKS_PER_CORE = 4
"""More of them on one machine and a run is slower than it need be."""


def run(
    config: RunConfig,
    *,
    entry: str = worker.DEFAULT_ENTRY,
    origin: Mapping[str, str] | None = None,
    sink: Sink | None = None,
) -> dict[str, Any]:
    """Run it and return the report, the object that `--json` prints.

    Args:
        config: what to do.
        entry: `module:function` that each rank runs; a `preflight(config)` beside it is called first.
        origin: dotted name -> where the value came from, for the report.
        sink: gets progress messages (`launch.progress.Screen()` shows them).

    Raises:
        ConfigError: found wrong before any rank started.
        RunFailed: a rank failed or time ran out; `.failure` says which and how.

    Example:
        >>> report = run(RunConfig(video=VideoConfig(paths=("clip.mp4",))))  # doctest: +SKIP
    """
    started = time.monotonic()
    before_start(config, entry)
    warnings = _check_machine(config)
    for warning in warnings if sink is not None else ():
        sink({"line": f"warning: {warning}"})
    name, nproc = config.engine.name, config.engine.nproc
    with RunFolder(config.output.out, config.output.overwrite) as folder:
        _mark(folder.path, config, origin or {}, name, warnings)
        outcome = engines.build(name).start(config, nproc, folder.path, entry, sink=sink, started=started)
        if outcome.failure is not None:
            _write_failure(folder.path, outcome.failure)
            raise RunFailed(outcome.failure, folder.path / "logs")
        report = _report(folder.path, outcome.records, {"total": time.monotonic() - started})
        _finish(folder, report, outcome.records)
    return report


def run_as_rank(
    config: RunConfig,
    place: Place,
    *,
    entry: str = worker.DEFAULT_ENTRY,
    origin: Mapping[str, str] | None = None,
    sink: Sink | None = None,
) -> dict[str, Any] | None:
    """Be one rank of a run that somebody else started; gives the report on rank 0 and None elsewhere. Collective."""
    started = time.monotonic()
    with worker.joined(config, place) as (settled, group):
        _agree_to_start(config, entry, place, group)
        record = worker.work(settled, entry, place, group, sink if place.rank == 0 else None)
        records = gather_records(record, group)
        if place.rank != 0:
            return None
        with RunFolder(config.output.out, config.output.overwrite) as folder:
            _mark(folder.path, config, origin or {}, place.source)
            for each in records:
                write_atomic(folder.path / "records" / f"rank-{each.rank}.json", each.to_json())
            report = _report(folder.path, records, {"total": time.monotonic() - started})
            _finish(folder, report, records)
        return report


def before_start(config: RunConfig, entry: str) -> None:
    """Find every mistake that can be known now. Raises ConfigError with one line."""
    if config.output.out is not None:
        check_target(config.output.out, config.output.overwrite)
    module = "launch.preflight" if entry == worker.DEFAULT_ENTRY else entry.partition(":")[0]
    try:
        preflight = getattr(importlib.import_module(module), "preflight", None)
        if preflight is not None:
            preflight(config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(one_line(error)) from error
    except ImportError as error:
        raise ConfigError(f"{one_line(error)}; install the extras of this project that bring it") from error


def _check_machine(config: RunConfig) -> list[str]:
    """Whether this machine is enough, where the ranks will be on it; gives what to warn of.

    Raises ConfigError for GPUs that are not there.
    """
    if config.engine.ray_address is not None:
        return []
    nproc = config.engine.nproc
    if config.engine.device == "cuda":
        worker.settle_device("cuda", Place(0, nproc, 0, nproc, "torchrun"))
    if nproc <= RANKS_PER_CORE * worker.cores():
        return []
    return [f"{nproc} ranks on {worker.cores()} cores: they wait for each other most of the time; lower --nproc"]


def rerender(folder: Path) -> dict[str, Any]:
    """Make report.json, report.txt and the pictures of a saved run again from its records."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if mark["made_by"] != MADE_BY:
            raise ValueError("marked by somebody else")
        records = [RankRecord.from_json(path.read_bytes()) for path in (folder / "records").glob("rank-*.json")]
        report = _report(folder, records, mark["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder}: no saved run of ours ({one_line(error, 160)}); give the folder that `tokenring run --out` wrote"
        ) from None
    _write_report(folder, report, records)
    return report


def gather_records(record: RankRecord, group: dist.ProcessGroup) -> list[RankRecord]:
    """Every rank's record, on every rank. They travel as JSON text, never as pickles."""
    import torch
    import torch.distributed as dist

    mine = torch.frombuffer(bytearray(record.to_json().encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([mine.numel()]), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.cat([mine, torch.zeros(longest - mine.numel(), dtype=torch.uint8)])
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(texts, padded, group=group)
    return [RankRecord.from_json(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes)]


class StoppedByRankZero(ConfigError):
    """Rank 0 found the configuration wrong and says so itself."""


def _agree_to_start(config: RunConfig, entry: str, place: Place, group: dist.ProcessGroup) -> None:
    """Rank 0 checks for all, so that one line is printed and nobody waits for a rank that left."""
    import torch
    import torch.distributed as dist

    problem = None
    if place.rank == 0:
        try:
            before_start(config, entry)
        except ConfigError as error:
            problem = error
    verdict = torch.tensor([int(problem is not None)])
    dist.broadcast(verdict, src=0, group=group)
    if problem is not None:
        raise problem
    if verdict.item():
        raise StoppedByRankZero("rank 0 refused the configuration")


def _mark(
    folder: Path, config: RunConfig, origin: Mapping[str, str], engine: str, warnings: Sequence[str] = ()
) -> None:
    """What a report needs besides the records."""
    known = {"engine": engine, "config": settings.described(config, origin), "seconds": {}, "warnings": list(warnings)}
    write_atomic(folder / MARK, json.dumps({"made_by": MADE_BY, **known}))


def _report(folder: Path, records: Sequence[RankRecord], seconds: Mapping[str, float]) -> dict[str, Any]:
    mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    if mark["seconds"] != seconds:
        write_atomic(folder / MARK, json.dumps({**mark, "seconds": dict(seconds)}))
    report = merge(records, engine=mark["engine"], config=mark["config"], seconds=seconds)
    report["warnings"] = [*mark["warnings"], *report["warnings"]]
    return report


def _finish(folder: RunFolder, report: dict[str, Any], records: Sequence[RankRecord]) -> None:
    """Write what a kept folder shows, drop what only the ranks needed, and publish."""
    if folder.target is not None:
        _write_report(folder.path, report, records)
        for leftover in ("pids", "failures"):
            shutil.rmtree(folder.path / leftover, ignore_errors=True)
        for leftover in ("rendezvous", "progress.jsonl"):
            (folder.path / leftover).unlink(missing_ok=True)
    folder.publish()


def _write_report(folder: Path, report: dict[str, Any], records: Sequence[RankRecord]) -> None:
    from launch import plots

    drawn = plots.write(folder, records)
    if drawn is not None:
        report["warnings"].append(drawn)
    write_atomic(folder / REPORT_JSON, json.dumps(report, indent=2) + "\n")
    write_atomic(folder / REPORT_TEXT, as_text(report))


def _write_failure(folder: Path, failure: Failure) -> None:
    write_atomic(folder / "failure.json", json.dumps(asdict(failure), indent=2) + "\n")

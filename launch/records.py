"""What one rank hands back, and how the records of all ranks become the one object of `--json`.

    rank 0 ─ RankRecord ┐
    rank 1 ─ RankRecord ┼─ merge ─► report {version, hardware, ranks, engine, schedule, frames, tokens_before, ...}
    rank 2 ─ RankRecord ┘

Everything is JSON safe; floats that are not finite travel as the strings "nan", "inf" and "-inf" (JSON has no such numbers).
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from typing import TYPE_CHECKING, Any

from launch.experts_report import merge_experts
from launch.sparse_report import merge_sparse

if TYPE_CHECKING:
    import numpy as np

STAGES = ("load", "read", "encode", "reduce", "splice", "prefill", "decode", "verify")
"""Their order wherever stages are listed; others come after these."""
SAME_ON_EVERY_RANK = ("world", "frames", "tokens_before", "tokens_after", "generated_ids", "text")


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """One rank's share of a run. The pipeline fills it; `rank`, `world`, `host` and `hardware` are the worker's."""

    rank: int = 0
    """Global rank."""
    world: int = 1
    """Number of ranks."""
    host: str = ""
    """Name of the machine."""
    hardware: dict[str, Any] = field(default_factory=dict)
    """cpu, cores, memory_bytes, device, torch, python of that machine."""
    schedule: str = ""
    """The attention schedule that ran (what `auto` chose); "anchor" where layers prefilled sparsely."""
    links: dict[str, Any] | None = None
    """What was known of the links between the ranks (`tokenring.Topology.to_dict`)."""
    attention: dict[str, Any] | None = None
    """What `launch.sparse.SparseRun.record` gives, with sparse prefill."""
    frames: int = 0
    """Frames of the whole video that were encoded, over all ranks."""
    tokens_before: int = 0
    """Visual tokens of the whole video before reduction."""
    tokens_after: int = 0
    """Visual tokens of the whole video after reduction."""
    tokens_local: int = 0
    """Rows of the prefilled sequence (text and visual) that this rank held."""
    cache_bytes: int = 0
    """Bytes of this rank's key/value cache at the end."""
    peak_bytes: int = 0
    """Largest memory of this rank (resident set on cpu, allocated on cuda)."""
    stage_peak_bytes: dict[str, int] = field(default_factory=dict)
    """The same for each stage."""
    bytes_sent: dict[int, int] = field(default_factory=dict)
    """Destination rank -> payload bytes that left this rank for it."""
    experts: dict[str, Any] | None = None
    """What `launch.experts.Experts.record` gives, where the model has experts."""
    generated_ids: list[int] = field(default_factory=list)
    """Tokens written, in order; the same on every rank."""
    text: str = ""
    """Their text; the same on every rank."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage; besides `first_token` (from the end of loading) and `decode` (all later tokens)."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Timeline: {"kind": stage|compute|merge|send|wait, "name", "start", "stop"}, seconds on the log's clock."""
    kept: list[dict[str, Any]] = field(default_factory=list)
    """Sample frames: {"frame", "seconds", "grid": [h, w], "cells": [kept cells, row-major], "image": pack_image(...)}."""
    verify: dict[str, Any] | None = None
    """{"max_logit_diff", "tolerance", "same_tokens", ...} on the rank that compared, None elsewhere."""
    warnings: list[str] = field(default_factory=list)
    """What the user should act on."""
    notes: list[str] = field(default_factory=list)
    """What the user should know."""

    @classmethod
    def of(cls, result: RankRecord | Mapping[str, Any], **known: Any) -> RankRecord:
        """A record from what a pipeline returned, with the worker's own fields on top. Unknown names are refused."""
        values = asdict(result) if isinstance(result, RankRecord) else dict(result)
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"the record has unknown fields {sorted(unknown)}; see launch.records.RankRecord")
        return cls(**{**values, **known})

    def to_json(self) -> str:
        """JSON text; `from_json` gives an equal record back."""
        return json.dumps(json_safe(asdict(self)))

    @classmethod
    def from_json(cls, text: str | bytes) -> RankRecord:
        """The inverse of `to_json`."""
        values = json.loads(text)
        values["bytes_sent"] = {int(peer): size for peer, size in values["bytes_sent"].items()}
        return cls(**values)


def json_safe(value: Any) -> Any:
    """The value in JSON's types: tuples as lists, numpy scalars as numbers, non-finite floats as strings."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        return json_safe(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def merge(
    records: Iterable[RankRecord], *, engine: str, config: Mapping[str, Any], seconds: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """All records as the report object.

    `records` one a rank, in any order; `engine` what started them; `config` dotted name -> {"value", "from"} as
    `launch.settings.described` gives; `seconds` times of the whole run that no rank knows, such as {"total": ...}.
    Raises ValueError where a rank is missing or ranks disagree about the result: something is broken, not the input.
    """
    ordered = sorted(records, key=lambda record: record.rank)
    _check_agreement(ordered)
    first = ordered[0]
    stages = _slowest(record.seconds for record in ordered)
    verify = next((record.verify for record in ordered if record.verify is not None), None)
    return json_safe(
        {
            "version": metadata.version("tokenring-parallel"),
            "hardware": _hardware(ordered),
            "ranks": len(ordered),
            "engine": engine,
            "schedule": first.schedule,
            "links": first.links,
            "frames": first.frames,
            "tokens_before": first.tokens_before,
            "tokens_after": first.tokens_after,
            "tokens_per_rank": [record.tokens_local for record in ordered],
            "cache_bytes_per_rank": [record.cache_bytes for record in ordered],
            "peak_bytes_per_rank": [record.peak_bytes for record in ordered],
            "stage_peak_bytes_per_rank": [record.stage_peak_bytes for record in ordered],
            "bytes_sent": [[r.bytes_sent.get(peer, 0) for peer in range(len(ordered))] for r in ordered],
            "attention": merge_sparse([record.attention for record in ordered]),
            "experts": merge_experts([record.experts for record in ordered]),
            "generated_ids": first.generated_ids,
            "text": first.text,
            "seconds": {**stages, **(seconds or {})},
            "tokens_per_second": _rate(first.generated_ids, stages),
            "verify": verify,
            "warnings": _unique(record.warnings for record in ordered),
            "notes": _unique(record.notes for record in ordered),
            "config": dict(config),
        }
    )


def verified(report: Mapping[str, Any]) -> bool:
    """False when a comparison ran and did not hold.

    Where the comparison has verdicts of its own (keys that end in `within_tolerance`) all of them must be true; otherwise
    the difference must be at most the tolerance. A difference that is not a number never holds.
    """
    verify = report["verify"]
    if verify is None:
        return True
    verdicts = [bool(value) for name, value in verify.items() if name.endswith("within_tolerance")]
    return all(verdicts) if verdicts else float(verify["max_logit_diff"]) <= float(verify["tolerance"])


def pack_image(image: np.ndarray, longest: int = 256) -> dict[str, Any]:
    """A picture (H, W, 3) uint8 as JSON: averaged down by a whole factor to at most about `longest` a side, deflated."""
    import numpy as np

    step = max(1, math.ceil(max(image.shape[:2]) / longest))
    height, width = (size // step for size in image.shape[:2])
    blocks = image[: height * step, : width * step].reshape(height, step, width, step, 3)
    small = blocks.mean(axis=(1, 3)).round().astype(np.uint8)
    data = base64.b64encode(zlib.compress(small.tobytes(), 6)).decode("ascii")
    return {"height": height, "width": width, "rgb": data}


def unpack_image(packed: Mapping[str, Any]) -> np.ndarray:
    """The (H, W, 3) uint8 picture that `pack_image` stored."""
    import numpy as np

    flat = np.frombuffer(zlib.decompress(base64.b64decode(packed["rgb"])), dtype=np.uint8)
    return flat.reshape(packed["height"], packed["width"], 3)


def _check_agreement(ordered: Sequence[RankRecord]) -> None:
    if not ordered:
        raise ValueError("no rank left a record")
    world = ordered[0].world
    missing = sorted(set(range(world)) - {record.rank for record in ordered})
    if missing or len(ordered) != world:
        raise ValueError(f"{len(ordered)} records for {world} ranks; missing ranks {missing}")
    for name in SAME_ON_EVERY_RANK:
        for record in ordered[1:]:
            if getattr(record, name) != getattr(ordered[0], name):
                mine, theirs = getattr(ordered[0], name), getattr(record, name)
                raise ValueError(f"ranks 0 and {record.rank} disagree about {name}: {mine!r} and {theirs!r}")


def _slowest(per_rank: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Per stage the slowest rank's seconds: what the run waited for; in one order, whichever rank came to a stage first."""
    slowest: dict[str, float] = {}
    for seconds in per_rank:
        for stage, value in seconds.items():
            slowest[stage] = max(value, slowest.get(stage, 0.0))
    return {stage: slowest[stage] for stage in dict.fromkeys([*STAGES, *slowest]) if stage in slowest}


def _rate(generated_ids: Sequence[int], seconds: Mapping[str, float]) -> float | None:
    """Tokens per second after the first one; None where there was no second token."""
    later = len(generated_ids) - 1
    spent = seconds.get("decode", 0.0)
    return later / spent if later > 0 and spent > 0 else None


def _hardware(ordered: Sequence[RankRecord]) -> list[dict[str, Any]]:
    """One entry a machine, with the ranks it ran."""
    machines: dict[str, dict[str, Any]] = {}
    for record in ordered:
        machine = machines.setdefault(record.host, {"host": record.host, **record.hardware, "ranks": []})
        machine["ranks"].append(record.rank)
    return list(machines.values())


def _unique(lists: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(text for texts in lists for text in texts))

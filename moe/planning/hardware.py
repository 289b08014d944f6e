"""Constants of a machine, from a JSON file: what its parts can do, and the share of it that training software gets.

Every number of the model that is not a size of the network or of the mapping is here, and each file says which came from a data
sheet, which were fitted and on what (`sources`).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

PRECISIONS = ("bf16", "fp8")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One machine; rates are per rank.

    >>> h = Hardware.load("h100")
    >>> h.ranks_per_node, h.bf16_tflops
    (8, 989.5)
    """

    name: str
    """What it is."""
    ranks_per_node: int
    """Devices that share the fast links."""
    bf16_tflops: float
    """Peak of matrix products in bf16, dense."""
    fp8_tflops: float
    """Peak of matrix products in FP8, dense."""
    gemm_bf16: float
    """Share of the peak that a large matrix product reaches inside a training step, bf16."""
    gemm_fp8: float
    """The same, FP8."""
    gemm_half_depth: float
    """Inner length at which a matrix product's tile loses half its time to its start and end."""
    multiprocessors: int
    """Tiles that are computed at once."""
    attention_forward: float
    """Share of the bf16 peak that causal attention over a long sequence reaches, forward."""
    attention_backward: float
    """The same, backward."""
    attention_half_length: float
    """Sequence length at which causal attention reaches half of that."""
    memory_gib: float
    """Device memory."""
    memory_usable: float
    """Share of it left for tensors, after the driver, communication buffers and fragmentation."""
    memory_gbytes_per_s: float
    """Bandwidth of device memory."""
    memory_efficiency: float
    """Share of it that element-wise kernels reach."""
    inside_gbytes_per_s: float
    """Link inside a node, one direction."""
    inside_efficiency: float
    """Share of it that collectives reach."""
    inside_latency_us: float
    """Of one collective inside a node."""
    between_gbytes_per_s: float
    """Link of one rank out of its node, one direction."""
    between_efficiency: float
    """Share of it that collectives reach."""
    between_latency_us: float
    """Of one collective between nodes."""
    moe_layer_us: float
    """Launches and host waits of one layer with experts, forward and backward of one micro-batch."""
    permute_passes: float
    """Times a routed row is read or written to sort it, at its source and again at the experts' rank; forward and backward."""
    sharded_overlap: float
    """Share of computing that hides the gathers of fully sharded data parallelism."""
    sources: tuple[tuple[str, str], ...] = ()
    """Where the numbers come from."""

    def __post_init__(self) -> None:
        shares = (
            "gemm_bf16",
            "gemm_fp8",
            "attention_forward",
            "attention_backward",
            "memory_usable",
            "memory_efficiency",
        )
        shares += ("inside_efficiency", "between_efficiency")
        may_be_zero = ("inside_latency_us", "between_latency_us", "moe_layer_us", "permute_passes", "sharded_overlap")
        may_be_zero += ("gemm_half_depth", "attention_half_length")
        for field in fields(self):
            if field.name in ("name", "sources"):
                continue
            value = getattr(self, field.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and field.name not in may_be_zero):
                raise ValueError(f"Hardware got {field.name}={value!r}; give a number above 0")
            if value > 1 and field.name in (*shares, "sharded_overlap"):
                raise ValueError(f"Hardware got {field.name}={value!r}; it is a share: give at most 1")
        for name in ("ranks_per_node", "multiprocessors"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"Hardware got {name}={getattr(self, name)!r}; give a whole number")

    def but(self, **changes: Any) -> Hardware:
        """The same machine with other numbers.

        >>> Hardware.load("h100").but(between_gbytes_per_s=100).between_gbytes_per_s
        100
        """
        names = [field.name for field in fields(self)]
        if unknown := sorted(set(changes) - set(names)):
            raise ValueError(f"Hardware has no {unknown[0]!r}; give one of {', '.join(names)}")
        return replace(self, **changes)

    def peak(self, precision: str) -> float:
        """Peak FLOP/s of matrix products."""
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}; give one of {', '.join(PRECISIONS)}")
        return 1e12 * (self.bf16_tflops if precision == "bf16" else self.fp8_tflops)

    @property
    def memory_bytes(self) -> float:
        """Bytes a rank may fill with tensors."""
        return self.memory_gib * 2**30 * self.memory_usable

    @property
    def memory_rate(self) -> float:
        """Bytes/s of element-wise kernels."""
        return 1e9 * self.memory_gbytes_per_s * self.memory_efficiency

    @property
    def inside_rate(self) -> float:
        """Bytes/s of a rank's collectives inside its node."""
        return 1e9 * self.inside_gbytes_per_s * self.inside_efficiency

    @property
    def between_rate(self) -> float:
        """Bytes/s of a rank's collectives out of its node."""
        return 1e9 * self.between_gbytes_per_s * self.between_efficiency

    @staticmethod
    def load(source: str | Path) -> Hardware:
        """A file of this package by name ("h100"), or a JSON file by path."""
        return _load(str(source))


def shipped() -> list[str]:
    """Names of the machines that come with the package.

    >>> shipped()
    ['h100']
    """
    return sorted(entry.name[:-5] for entry in (files("moe") / "hardware").iterdir() if entry.name.endswith(".json"))


@lru_cache(maxsize=16)
def _load(source: str) -> Hardware:
    if source in shipped():
        text = (files("moe") / "hardware" / f"{source}.json").read_text()
    elif Path(source).is_file():
        text = Path(source).read_text()
    else:
        raise ValueError(f"no hardware {source!r}; give one of {', '.join(shipped())}, or the path of a JSON file")
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"hardware {source!r} is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(
            f"hardware {source!r} holds a {type(given).__name__}; give one object with the fields of Hardware"
        )
    known = {field.name for field in fields(Hardware)}
    missing, unknown = sorted(known - set(given) - {"sources"}), sorted(set(given) - known)
    if missing or unknown:
        raise ValueError(
            f"hardware {source!r}: missing {missing}, unknown {unknown}; give exactly the fields of Hardware"
        )
    sources = given.pop("sources", {})
    return Hardware(**given, sources=tuple(sorted(sources.items())))

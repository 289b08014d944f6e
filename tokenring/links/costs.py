"""What computing costs on one rank: the part of a time model that is not links."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

ANY_DTYPE = "any"
FORWARD_FACTORS, BACKWARD_FACTORS = (1, 1), (3, 2)
"""Matrix products of the width of queries and keys, and of the width of values; 2 pairs width flops a head each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeRate:
    """How fast one rank computes attention tiles in one dtype, all ranks computing at once.

    forward work    2 pairs heads (D + Dv)      flops: q k^T and p v
    backward work   2 pairs heads (3 D + 2 Dv)  flops: q k^T again, ds k, ds^T q, do v^T, p^T do
    """

    forward_flops: float
    """Flop/s of the forward kernel."""
    backward_flops: float | None = None
    """Flop/s of the backward kernel; None: as forward."""
    tile_us: float = 0.0
    """Microseconds of a kernel call on top of its flops."""
    dtype: str = ANY_DTYPE
    """Of q, k and v, as torch prints it without "torch."; "any" for all that have no rate of their own."""

    def __post_init__(self) -> None:
        check_rate("ComputeRate", "forward_flops", self.forward_flops, "flop/s above 0")
        if self.backward_flops is not None:
            check_rate("ComputeRate", "backward_flops", self.backward_flops, "flop/s above 0, or None")
        check_time("ComputeRate", "tile_us", self.tile_us)
        if self.dtype != ANY_DTYPE and not isinstance(getattr(torch, str(self.dtype), None), torch.dtype):
            raise ValueError(f'ComputeRate got dtype={self.dtype!r}; give "any" or a name like "bfloat16"')


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """Fixed costs and compute rates of one rank.

    >>> Costs(compute=(ComputeRate(forward_flops=6e14),)).rate(torch.bfloat16).forward_flops
    600000000000000.0
    """

    compute: tuple[ComputeRate, ...] = ()
    """One for each dtype."""
    merge_gbytes_per_s: float | None = None
    """GB/s of partial results joined to others; None: as if it cost nothing."""
    message_us: float = 0.0
    """Microseconds a rank is busy with posting one tensor to send or to receive."""
    operation_us: float = 0.0
    """Microseconds a rank is busy with one operation of its program, whatever else it costs."""
    slowdown: float = 0.0
    """Share of its compute rate that a rank loses while messages move: 0 where they cost it nothing, 1 where it stops."""

    def __post_init__(self) -> None:
        if not isinstance(self.compute, tuple) or not all(isinstance(rate, ComputeRate) for rate in self.compute):
            raise ValueError(f"Costs got compute={self.compute!r}; give a tuple of ComputeRate")
        names = [rate.dtype for rate in self.compute]
        if len(names) > len(set(names)):
            raise ValueError(f"Costs got two compute rates of one dtype ({', '.join(names)}); give one of each")
        if self.merge_gbytes_per_s is not None:
            check_rate("Costs", "merge_gbytes_per_s", self.merge_gbytes_per_s, "GB/s above 0, or None")
        check_time("Costs", "message_us", self.message_us)
        check_time("Costs", "operation_us", self.operation_us)
        if not is_number(self.slowdown) or not 0 <= self.slowdown <= 1:
            raise ValueError(f"Costs got slowdown={self.slowdown!r}; give a share from 0 to 1")

    def rate(self, dtype: torch.dtype) -> ComputeRate | None:
        """The compute rate of a dtype; None where none is known."""
        known = {rate.dtype: rate for rate in self.compute}
        return known.get(str(dtype).removeprefix("torch."), known.get(ANY_DTYPE))


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_rate(where: str, name: str, value: Any, allowed: str = "GB/s (1e9 bytes per second) above 0") -> None:
    """ValueError unless `value` is a finite number above 0."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{where} got {name}={value!r}; give {allowed}")


def check_time(where: str, name: str, value: Any) -> None:
    """ValueError unless `value` is a finite number, 0 or more."""
    if not is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{where} got {name}={value!r}; give microseconds, 0 or more")


def check_count(where: str, name: str, value: Any) -> None:
    """ValueError unless `value` is a whole number, 1 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where} got {name}={value!r}; give a whole number, 1 or more")

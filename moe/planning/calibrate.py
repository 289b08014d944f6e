"""Fits the few free constants of a machine on published steps, and says how well rows that were left out come out.

    minimise   sum over rows of (log modelled - log published)^2 + sum over constants of (log c - log c0)^2 / width^2

by damped Gauss-Newton in log c. c0 are the constants one would guess, `width` how far off a guess may be; the second sum keeps
constants apart that the rows alone cannot tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe.planning.hardware import Hardware
from moe.planning.published import Row


@dataclass(frozen=True)
class Free:
    """A constant that is fitted."""

    name: str
    guess: float
    width: float
    """One standard deviation of the guess, as a logarithm."""
    most: float = math.inf


FREE = (
    Free("gemm_bf16", 0.7, 0.15, 0.85),
    Free("gemm_fp8", 0.55, 0.2, 0.8),
    Free("inside_efficiency", 0.65, 0.2, 0.85),
    Free("between_efficiency", 0.8, 0.2, 0.95),
    Free("moe_layer_us", 1000, 0.7),
    Free("permute_passes", 20, 0.7),
    Free("sharded_overlap", 0.5, 0.7, 1.0),
)
WEIGHT = 0.1
"""Standard deviation of a row, as a logarithm."""


def fit(rows: Sequence[Row], start: Hardware, *, rounds: int = 20) -> Hardware:
    """The machine whose free constants fit these rows best; rows without a figure do not count."""
    rows = [row for row in rows if row.mfu is not None]
    if not rows:
        raise ValueError("fit needs rows with a published figure; given none")
    guess = np.log([free.guess for free in FREE])
    width = np.array([free.width for free in FREE])
    most = np.log([free.most for free in FREE])

    def machine(logs: np.ndarray) -> Hardware:
        return start.but(**{free.name: float(math.exp(value)) for free, value in zip(FREE, logs)})

    def residuals(logs: np.ndarray) -> np.ndarray:
        hardware = machine(logs)
        off = [math.log(row.modelled(hardware) / row.mfu) / WEIGHT for row in rows]
        return np.concatenate([off, (logs - guess) / width])

    logs, damping = np.minimum(guess, most), 1e-2
    best = residuals(logs)
    for _ in range(rounds):
        slope = np.stack(
            [(residuals(logs + step) - residuals(logs - step)) / 0.04 for step in 0.02 * np.eye(len(FREE))], 1
        )
        for _ in range(8):
            change = np.linalg.solve(slope.T @ slope + damping * np.eye(len(FREE)), -slope.T @ best)
            moved = np.minimum(logs + np.clip(change, -0.5, 0.5), most)
            tried = residuals(moved)
            if tried @ tried < best @ best:
                logs, best, damping = moved, tried, damping / 3
                break
            damping *= 4
        else:
            break
    return machine(logs)


@dataclass(frozen=True)
class Report:
    """Published against modelled."""

    lines: tuple[tuple[Row, float, bool], ...]
    """(row, modelled share of the bf16 peak, whether it fits in memory)."""

    @property
    def errors(self) -> list[float]:
        """Modelled over published, less 1, of the rows that have a figure."""
        return [modelled / row.mfu - 1 for row, modelled, _ in self.lines if row.mfu is not None]

    @property
    def mean_error(self) -> float:
        """Mean size of `errors`."""
        return sum(map(abs, self.errors)) / len(self.errors)

    def table(self) -> str:
        """For people."""
        lines = [f"{'model':<20}{'method':<15}{'mapping':<26}{'published':>10}{'modelled':>10}{'error':>8}"]
        for row, modelled, fits in self.lines:
            f = row.folding
            mapping = f"tp{f.tp} cp{f.cp} pp{f.pp} ep{f.ep} etp{f.etp} {row.job.precision}"
            known = "OOM" if row.mfu is None else f"{row.mfu:.3f}"
            error = "" if row.mfu is None else f"{modelled / row.mfu - 1:+.1%}"
            said = f"{modelled:.3f}" if fits else "OOM"
            lines.append(f"{row.model:<20}{row.method:<15}{mapping:<26}{known:>10}{said:>10}{error:>8}")
        worst = max(map(abs, self.errors))
        lines.append(f"mean error {self.mean_error:.1%}, largest {worst:.1%}, {len(self.errors)} rows")
        return "\n".join(lines)


def report(rows: Sequence[Row], hardware: Hardware) -> Report:
    """Model these rows."""
    steps = [(row, row.step(hardware)) for row in rows]
    return Report(tuple((row, 1e12 * step.tflops / hardware.peak("bf16"), step.fits) for row, step in steps))


def held_out(rows: Sequence[Row], start: Hardware) -> dict[str, Report]:
    """For every model: its rows, modelled with constants that were fitted on the other models' rows."""
    reports = {}
    for name in sorted({row.model for row in rows}):
        hardware = fit([row for row in rows if row.model != name], start)
        reports[name] = report([row for row in rows if row.model == name], hardware)
    return reports

"""Measure cells: every schedule in turn, beside its bound, its simulation and what "auto" would have taken."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from benchmarks.linklab import jobs
from benchmarks.linklab.bounds import bound
from benchmarks.linklab.cells import Cell, model
from benchmarks.linklab.crew import Crew, hire
from benchmarks.linklab.lab import build
from benchmarks.linklab.raw import link_rates
from benchmarks.linklab.wiring import Link


@dataclass(frozen=True)
class Row:
    """One schedule in one cell; seconds."""

    schedule: str
    runs: list[float]
    bound: float
    simulated: float
    bytes_sent: int

    @property
    def measured(self) -> float:
        """Median of the runs."""
        return statistics.median(self.runs)

    @property
    def over_bound(self) -> float:
        return self.measured / self.bound


@dataclass(frozen=True)
class Result:
    """One cell, measured."""

    cell: Cell
    rows: list[Row]
    auto: str
    compute_seconds: float
    raw_share: float
    """What raw sockets reach of the nominal rate, median over the links."""

    def row(self, schedule: str) -> Row:
        return next(row for row in self.rows if row.schedule == schedule)

    @property
    def best(self) -> Row:
        return min(self.rows, key=lambda row: row.measured)

    @property
    def auto_over_best(self) -> float:
        """How many times the best schedule's time that of the choice of "auto" was."""
        return self.row(self.auto).measured / self.best.measured

    def to_dict(self) -> dict:
        """For JSON."""
        shape = self.cell.shape
        return {
            "cell": asdict(self.cell),
            "shape": [shape.batch, shape.q_length, shape.kv_length, shape.q_heads, shape.kv_heads, shape.head_dim],
            "raw_share_of_nominal": self.raw_share,
            "compute_seconds": self.compute_seconds,
            "auto": self.auto,
            "best": self.best.schedule,
            "auto_over_best": self.auto_over_best,
            "rows": [asdict(row) | {"measured": row.measured, "over_bound": row.over_bound} for row in self.rows],
        }


def measure(cells: list[Cell], schedules: list[str] | None, repeat: int, seconds: float) -> Iterator[Result]:
    """Results in the order of the cells. The lab stands as long as the topology stays; only its rates are changed.

    Args:
        cells: what to measure; those of one topology side by side.
        schedules: names, measured in turn; None for all that a cell has; what "auto" takes is added where it is not among them.
        repeat: timed rounds; the median counts.
        seconds: size of a cell: about what the bound of its fastest schedule is.
    """
    with ExitStack() as stack:
        crew, rates = None, {}
        for cell in cells:
            wiring = cell.wiring
            if crew is None or (crew.lab.wiring.name, crew.lab.wiring.world) != (wiring.name, wiring.world):
                stack.close()
                crew = stack.enter_context(hire(stack.enter_context(build(wiring))))
                rates = link_rates(crew)
            elif crew.lab.wiring != wiring:
                crew.lab.retune(wiring)
                rates = link_rates(crew)
            names = schedules or cell.schedules
            yield _cell(crew, cell.sized(names, seconds), names, repeat, rates)


def _cell(crew: Crew, cell: Cell, schedules: list[str], repeat: int, rates: dict[Link, float]) -> Result:
    wiring, topology = cell.wiring, model(cell.wiring, rates)
    auto = cell.plan("auto", topology).schedule
    plans = [cell.plan(name) for name in dict.fromkeys([*schedules, auto])]
    answers = crew.run(jobs.backward if cell.direction == "backward" else jobs.forward, plans, repeat)
    rows = [
        Row(
            plan.schedule,
            jobs.seconds([spans[index] for spans in answers]),
            bound(plan, wiring, rates),
            plan.simulate(topology).seconds,
            sum(plan.bytes_sent(rank) for rank in range(plan.world)),
        )
        for index, plan in enumerate(plans)
    ]
    computing = statistics.median(jobs.seconds(crew.run(jobs.compute, plans[0], 3)))
    share = statistics.median(rates[link] / (mbit * 1e6 / 8) for link, mbit in wiring.shaped.items())
    return Result(cell, rows, auto, computing, share)

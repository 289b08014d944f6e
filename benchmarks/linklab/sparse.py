"""AnchorAttention over ranks beside every dense schedule, in one cell of the lab: prefill, forward, columns planted.

Calls take turns: sparse with its exchanges hidden behind computing, the same call waiting for each exchange at once, and the
dense schedules. Rates are such that transfer decides, or computing, or neither.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

import tokenring as tr
from benchmarks.linklab import jobs
from benchmarks.linklab.bounds import bound
from benchmarks.linklab.cells import model
from benchmarks.linklab.crew import hire
from benchmarks.linklab.lab import build
from benchmarks.linklab.raw import link_rates
from benchmarks.linklab.wiring import wire
from benchmarks.sparse_ranks_data import at_stripes, planted
from sparse_attn import AnchorConfig
from sparse_attn.distributed import attend, exchange, group_layout

SCHEDULES = ("ring", "biring", "gather", "tokenring", "mesh:2x2")
"""Those that any number of key heads allows; mesh for four ranks."""
PLANTED = 0.1
"""Share of keys that are looked at."""


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """What is compared."""

    length: int = 16384
    heads: tuple[int, int] = (2, 2)
    dim: int = 64
    world: int = 4
    stripes: float = 0.1

    @property
    def shape(self) -> tr.AttentionShape:
        return tr.AttentionShape(1, self.length, self.length, *self.heads, self.dim, dtype=torch.float32)

    def config(self, identify: str) -> AnchorConfig:
        """With the theta that keeps the share of columns."""
        config = AnchorConfig(identify=identify, dense="never")
        return at_stripes(*self.tensors()[:2], config, self.stripes)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return planted(self.length, self.heads, self.dim, PLANTED, torch.float32)


@contextmanager
def waiting() -> Iterator[None]:
    """Inside the block every exchange is waited for as soon as it has begun."""
    begin = exchange.Wire.begin

    def at_once(self: exchange.Wire, *given: Any, **options: Any) -> exchange.Flight:
        flight = begin(self, *given, **options)
        arrived = flight.land()
        flight.land = lambda: arrived  # type: ignore[method-assign]
        return flight

    exchange.Wire.begin = at_once  # type: ignore[method-assign]
    try:
        yield
    finally:
        exchange.Wire.begin = begin  # type: ignore[method-assign]


def forward(
    rank: int, world: int, asked: Prefill, configs: list[AnchorConfig], plans: list[tr.Plan], repeat: int
) -> tuple[list[list[jobs.Span]], list[Any]]:
    """Spans of each configuration, of each once more waiting, then of each plan; and the statistics of the configurations."""
    layout, group = plans[0].problem.q_layout, dist.group.WORLD
    q, k, v = (layout.shard(x, rank).contiguous() for x in asked.tensors())

    def sparse(config: AnchorConfig, **options: Any) -> Any:
        return attend(q, k, v, group=group, layout=layout, config=config, **options)

    def patient(config: AnchorConfig) -> None:
        with waiting():
            sparse(config)

    for config in configs:
        with tr.count_traffic(group) as traffic:
            planned = sparse(config, return_stats=True)[1].bytes_sent
        if sum(traffic.sent.values()) != planned:
            raise AssertionError(f"rank {rank} sent {sum(traffic.sent.values())} bytes, its plans say {planned}")
    for plan in plans:
        tr.prepare(group, plan)
        tr.attention(q, k, v, group=group, plan=plan)
    calls = [lambda config=config: sparse(config) for config in configs]
    calls += [lambda config=config: patient(config) for config in configs]
    calls += [lambda plan=plan: tr.attention(q, k, v, group=group, plan=plan) for plan in plans]
    spans = jobs.turns(repeat, calls)
    found = [sparse(config, return_stats=True)[1] for config in configs]
    for stats in found:
        stats.plan = None
    return spans, found


@dataclass(frozen=True)
class Row:
    """One way in one cell; seconds."""

    name: str
    runs: list[float]
    bytes_sent: int
    transfer_bound: float
    """What its transfers alone need at least, one exchange after another."""

    @property
    def measured(self) -> float:
        return statistics.median(self.runs)


@dataclass(frozen=True)
class Result:
    """One cell."""

    topology: str
    mbit: float
    auto: str
    sparse: list[Row]
    waiting: list[Row]
    dense: list[Row]
    stats: list[dict[str, float]]

    @property
    def best_dense(self) -> Row:
        return min(self.dense, key=lambda row: row.measured)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        for kind in ("sparse", "waiting", "dense"):
            for row, given in zip(found[kind], getattr(self, kind)):
                row["measured"] = given.measured
        found["best dense"] = self.best_dense.name
        found["faster than best dense"] = [self.best_dense.measured / row.measured for row in self.sparse]
        found["gain of overlap"] = [w.measured / s.measured for s, w in zip(self.sparse, self.waiting)]
        return found


def measure(asked: Prefill, cells: list[tuple[str, float]], identify: list[str], repeat: int) -> Iterator[Result]:
    """One result for each topology and rate."""
    configs = [asked.config(name) for name in identify]
    layout = group_layout(asked.length, asked.world, configs[0])
    for topology, mbit in cells:
        wiring = wire(topology, asked.world, mbit)
        with ExitStack() as stack:
            crew = stack.enter_context(hire(stack.enter_context(build(wiring))))
            rates = link_rates(crew)
            known = model(wiring, rates)
            auto = tr.plan("auto", world=asked.world, shape=asked.shape, layout=layout, topology=known).schedule
            names = dict.fromkeys([*(n for n in SCHEDULES if asked.world == 4 or ":" not in n), auto])
            plans = [tr.plan(name, world=asked.world, shape=asked.shape, layout=layout) for name in names]
            answers = crew.run(forward, asked, configs, plans, repeat)
        seconds = [jobs.seconds([spans[i] for spans, _ in answers]) for i in range(len(answers[0][0]))]
        stats = answers[0][1]
        sparse = [
            (
                "sparse",
                identify[i],
                sum(s[i].bytes_sent for _, s in answers),
                sum(bound(p, wiring, rates) for p in stats[i].plans),
            )
            for i in range(len(configs))
        ]
        rows = [Row(f"{kind} {name}", runs, *rest) for (kind, name, *rest), runs in zip(sparse, seconds)]
        late = [Row(f"waiting {name}", runs, *rest) for (_, name, *rest), runs in zip(sparse, seconds[len(configs) :])]
        dense = [
            Row(p.schedule, runs, sum(p.bytes_sent(r) for r in range(p.world)), bound(p, wiring, rates))
            for p, runs in zip(plans, seconds[2 * len(configs) :])
        ]
        told = [
            {
                "seconds of ranks": [stats[i].seconds for _, stats in answers],
                "identify": name,
                "theta": c.theta,
                "stripes": s.stripe_density,
                "union": s.wanted,
                "imbalance": s.imbalance,
            }
            for i, (name, c, s) in enumerate(zip(identify, configs, stats))
        ]
        yield Result(topology, mbit, auto, rows, late, dense, told)


def table(result: Result) -> str:
    """One cell."""
    best = result.best_dense
    lines = [f"{result.topology} {result.mbit:g} Mbit/s; auto takes {result.auto}"]
    lines.append(f"  {'':<20} {'MB':>7} {'seconds':>8} {'spread':>15} {'transfers alone':>16} {'best dense / it':>15}")
    for row in (*result.sparse, *result.waiting, *result.dense):
        spread = f"{min(row.runs):.3f} to {max(row.runs):.3f}"
        lines.append(
            f"  {row.name:<20} {row.bytes_sent / 1e6:>7.1f} {row.measured:>8.3f} {spread:>15} {row.transfer_bound:>16.3f} "
            f"{best.measured / row.measured:>15.2f}"
        )
    for told in result.stats:
        phases = {name: max(s[name] for s in told["seconds of ranks"]) for name in told["seconds of ranks"][0]}
        lines.append(f"  {told['identify']}, slowest rank: " + ", ".join(f"{n} {x:.3f}" for n, x in phases.items()))
    return "\n".join(lines)

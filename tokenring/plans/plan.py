"""The Plan: a schedule applied to one problem and shape. Everything else reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from tokenring.plans.problem import QUERY_KINDS, Problem
from tokenring.plans.program import Operation, operations
from tokenring.plans.shape import AttentionShape
from tokenring.plans.step import Step, Transfer

if TYPE_CHECKING:
    from tokenring.checking.proof import Report
    from tokenring.simulation.timeline import Timeline
    from tokenring.topology import Topology

Builder = Callable[[Problem, int], tuple[Step, ...]]


@dataclass(frozen=True)
class Plan:
    """A schedule applied to one mask, layout and shape: immutable, hashable, the same on every rank.

    `steps(rank)` builds one rank's steps; everything else reads them.
    """

    schedule: str
    problem: Problem
    shape: AttentionShape
    builder: Builder = field(repr=False)
    why: str = ""
    partial_dtype: torch.dtype | None = None
    """Dtype of partial gradients on the wire; None: the input's."""

    @property
    def direction(self) -> str:
        return self.problem.direction

    @property
    def world(self) -> int:
        return self.problem.world

    def steps(self, rank: int) -> tuple[Step, ...]:
        """The steps of one rank."""
        self._check_rank(rank)
        return _steps(self.builder, self.problem, rank)

    def operations(self, rank: int) -> tuple[Operation, ...]:
        """What one rank does, in order: the steps as the executor runs them."""
        self._check_rank(rank)
        return _operations(self.builder, self.problem, rank)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world:
            raise ValueError(f"rank is {rank}; this plan has ranks 0 to {self.world - 1}")

    def bytes_sent(self, source: int, destination: int | None = None) -> int:
        """Exact payload bytes that `source` sends, to one rank or in all."""
        self._check_rank(source if destination is None else destination)
        return sum(
            self.transfer_bytes(transfer)
            for step in self.steps(source)
            for lane in step.sends
            for transfer in lane
            if destination in (None, transfer.destination)
        )

    def transfer_bytes(self, transfer: Transfer) -> int:
        """Payload bytes of one transfer."""
        heads = self.heads(transfer.what, transfer.heads)
        return transfer.rows * heads * self.shape.head_bytes(transfer.what, self.partial_dtype)

    def heads(self, what: str, heads: tuple[int, int] | None) -> int:
        """How many heads of a kind of slot: those given, or all."""
        if heads is not None:
            return heads[1] - heads[0]
        return self.shape.q_heads if what in QUERY_KINDS else self.shape.kv_heads

    def check(self) -> Report:
        """Prove the plan: every allowed pair computed once, transfers paired and held, partials merged once, no deadlock.

        Raises PlanError that names what is wrong; returns counts otherwise.
        """
        from tokenring.checking.proof import check

        return check(self)

    def simulate(self, topology: Topology, *, exact: bool | None = None) -> Timeline:
        """How long the plan takes on a topology, modelled: `.seconds`, and the time of every rank and link."""
        from tokenring.simulation.simulate import simulate

        return simulate(self, topology, exact=exact)

    def explain(self, topology: Topology | None = None) -> str:
        """A table of steps, bytes and tiles per rank, and why the schedule was chosen; with a topology the modelled times."""
        lines = [
            f"schedule {self.schedule} ({self.direction}), {self.world} ranks" + (f": {self.why}" if self.why else "")
        ]
        lines.append(
            f"{'rank':>4} {'steps':>5} {'messages':>8} {'bytes sent':>12} {'tiles':>5} {'pairs':>14}   by destination"
        )
        for rank in range(self.world):
            steps = self.steps(rank)
            sends = [t for step in steps for lane in step.sends for t in lane]
            tiles = [tile for step in steps for compute in step.computes for tile in compute.tiles]
            to = dict.fromkeys(sorted({t.destination for t in sends}), 0)
            for transfer in sends:
                to[transfer.destination] += self.transfer_bytes(transfer)
            lines.append(
                f"{rank:>4} {len(steps):>5} {len(sends):>8} {sum(to.values()):>12} {len(tiles):>5} "
                f"{sum(t.pairs() for t in tiles):>14}   {', '.join(f'{d}: {b}' for d, b in to.items()) or '-'}"
            )
        return "\n".join([*lines, self.simulate(topology).describe()] if topology is not None else lines)


@lru_cache(maxsize=4096)
def _steps(builder: Any, problem: Problem, rank: int) -> tuple[Step, ...]:
    return builder(problem, rank)


@lru_cache(maxsize=1024)
def _operations(builder: Any, problem: Problem, rank: int) -> tuple[Operation, ...]:
    return operations(_steps(builder, problem, rank))

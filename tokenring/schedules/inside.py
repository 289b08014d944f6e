"""One schedule inside another: its steps in other names, ranks and rows, and two steps as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tokenring.plans.step import LANES, Compute, Exchange, Piece, Slot, Step, Sum, Transfer


@dataclass(frozen=True)
class Renaming:
    """What a rank, a slot and the rows of a kind are called outside."""

    rank: Callable[[int], int]
    name: Callable[[str], str]
    pieces: Callable[[str, tuple[Piece, ...]], tuple[Piece, ...]]

    def step(self, step: Step) -> Step:
        """The same step."""
        return Step(
            self._exchange(step.sends),
            self._exchange(step.receives),
            tuple(map(self._slot, step.slots)),
            tuple(map(self._transfer, step.copies)),
            tuple(map(self._compute, step.computes)),
            tuple(Sum(self._slot(s.target), tuple(map(self.name, s.sources))) for s in step.sums),
            tuple(map(self.name, step.merges)),
        )

    def _slot(self, slot: Slot) -> Slot:
        return replace(slot, name=self.name(slot.name), pieces=self.pieces(slot.what, slot.pieces))

    def _transfer(self, t: Transfer) -> Transfer:
        ends = self.rank(t.source), self.rank(t.destination)
        names = self.name(t.source_slot), self.name(t.destination_slot)
        return Transfer(*ends, t.what, self.pieces(t.what, t.pieces), *names, t.heads)

    def _compute(self, c: Compute) -> Compute:
        return Compute(self.name(c.q), self.name(c.kv), tuple(map(self._slot, c.results)), c.tiles, c.heads)

    def _exchange(self, lanes: Exchange) -> Exchange:
        return tuple(tuple(map(self._transfer, lane)) for lane in lanes)


def beside(a: Step, b: Step) -> Step:
    """Two steps as one: what `a` sums, copies and merges needs nothing of what `b` computes."""
    sends, receives = (
        tuple((*x[lane], *y[lane]) for lane in LANES) for x, y in ((a.sends, b.sends), (a.receives, b.receives))
    )
    rest = (getattr(a, name) + getattr(b, name) for name in ("slots", "copies", "computes", "sums", "merges"))
    return Step(sends, receives, *rest)

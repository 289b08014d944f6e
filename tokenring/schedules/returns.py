"""Partial gradients of keys and values that go straight home, beside what a rank may merge at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenring.plans.problem import Problem
from tokenring.plans.step import Compute, Slot, Transfer, pieces
from tokenring.schedules.paths import block, wanted
from tokenring.segments import union


@dataclass(frozen=True)
class Returns:
    """What leaves and arrives after a step's compute, and which of its partials are this rank's own."""

    merges: tuple[str, ...] = ()
    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()
    slots: tuple[Slot, ...] = ()

    def __add__(self, other: Returns) -> Returns:
        return Returns(
            self.merges + other.merges,
            self.sends + other.sends,
            self.receives + other.receives,
            self.slots + other.slots,
        )


def key_returns(
    problem: Problem,
    rank: int,
    compute: Compute | None,
    step: int | str,
    helpers: Mapping[int, str],
    half: int | None = None,
) -> Returns:
    """Route a compute's partials: queries are this rank's own, keys may be of any rank.

    Args:
        compute: of this rank in this step; None where it has none.
        helpers: the ranks that compute on this rank's keys in this step, with the name of the partial they send.
        half: the half of this rank's rows that they compute on; None for all.
    """
    own = tuple(s for s in compute.results if s.what != "dkv") if compute else ()
    if not problem.backward:
        return Returns(tuple(s.name for s in own))
    merges, sends = [s.name for s in own], []
    for partial in (s for s in compute.results if s.what == "dkv") if compute else ():
        for owner in sorted({p.owner for p in partial.pieces}):
            rows = pieces(owner, union((p.start, p.stop) for p in partial.pieces if p.owner == owner))
            if owner == rank:
                merges.append(partial.name)
            else:
                sends.append(Transfer(rank, owner, "dkv", rows, partial.name, _landing(step, rank)))
    receives, slots = [], []
    for helper, name in sorted(helpers.items()):
        slot = block("dkv", _landing(step, helper), rank, wanted(problem, "kv", rank, helper, half))
        if helper != rank and slot.rows:
            receives.append(Transfer(helper, rank, "dkv", slot.pieces, name, slot.name))
            slots.append(slot)
    return Returns(tuple(merges), tuple(sends), tuple(receives), tuple(slots))


def _landing(step: int | str, helper: int) -> str:
    return f"dkv{step}:from{helper}"

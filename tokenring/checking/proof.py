"""The proof of a plan, on the same object that the executor runs.

slots     what each rank does with its slots is right by itself (see `tokenring.checking.slots`): among other things, every row
          and head of a partial is used exactly once, and merged only by its owner
paired    a transfer stands at the same (step, lane) on both of its ends, in one order for each pair, and never leads home
covered   the tiles of all ranks hold every allowed (query, key) pair exactly once in every head, and no other (see
          `tokenring.checking.cover`)
live      with every lane a first-in-first-out queue of grouped exchanges (NCCL's condition), no rank waits for ever (see
          `tokenring.checking.live`)

All of it costs about as much as building the plan: it sorts and sweeps, and compares nothing with everything.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from tokenring.checking.cover import check_covered
from tokenring.checking.live import check_live
from tokenring.checking.slots import PlanError, check_slots
from tokenring.plans.plan import Plan
from tokenring.plans.step import LANES, Step, Transfer

__all__ = ["PlanError", "Report", "check"]


@dataclass(frozen=True, slots=True)
class Report:
    """What a proven plan holds, over all ranks."""

    ranks: int
    pairs: int
    """Allowed pairs of one head; where batch entries have masks of their own, over all of them."""
    transfers: int
    bytes: int


def check(plan: Plan) -> Report:
    """Prove a plan, or raise PlanError."""
    steps = [plan.steps(rank) for rank in range(plan.world)]
    transfers = _paired(steps)
    for rank in range(plan.world):
        check_slots(plan, rank, steps[rank])
    pairs = check_covered(plan, steps)
    check_live(steps)
    total = sum(plan.bytes_sent(rank) for rank in range(plan.world))
    return Report(plan.world, pairs, transfers, total)


def _paired(steps: list[tuple[Step, ...]]) -> int:
    sends: defaultdict[tuple[int, int, int, int], list[Transfer]] = defaultdict(list)
    receives: defaultdict[tuple[int, int, int, int], list[Transfer]] = defaultdict(list)
    for rank, mine in enumerate(steps):
        for index, step in enumerate(mine):
            for lane in LANES:
                for transfer in step.sends[lane]:
                    if transfer.source != rank or transfer.destination == rank:
                        raise PlanError(
                            f"rank {rank}, step {index}: sends {transfer}, which is not from it to another rank"
                        )
                    sends[(index, lane, rank, transfer.destination)].append(transfer)
                for transfer in step.receives[lane]:
                    if transfer.destination != rank:
                        raise PlanError(f"rank {rank}, step {index}: receives {transfer}, which is not for it")
                    receives[(index, lane, transfer.source, rank)].append(transfer)
    for key in {**sends, **receives}:
        _same_messages(key, sends[key], receives[key])
    return sum(map(len, sends.values()))


def _same_messages(key: tuple[int, int, int, int], sent: list[Transfer], received: list[Transfer]) -> None:
    index, lane, source, destination = key
    if sent == received:
        return
    for transfer in (Counter(sent) - Counter(received)) + (Counter(received) - Counter(sent)):
        verb = "sent but not received" if sent.count(transfer) > received.count(transfer) else "received but not sent"
        raise PlanError(f"step {index}, lane {lane}: {transfer} is {verb}")
    raise PlanError(
        f"step {index}, lane {lane}: rank {destination} receives in another order than rank {source} sends; "
        "messages between two ranks match in order"
    )

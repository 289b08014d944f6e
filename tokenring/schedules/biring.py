"""Both-way ring: half of the keys and values travels each way round, queries stay.

    step 0      step 1            step 2            rank r holds, on step t, the first half (a) of the block of rank r - t
    KV0         a2  b1            a1  b2            and the second half (b) of the block of rank r + t

A one-way ring leaves half of every duplex link idle; this one sends N-1 half blocks in each direction at once. Backward, the
partial dk and dv of each half go straight home. Over a causal zigzag the second half, a late chunk, is wanted only by the
ranks before its owner, which is the way it travels.
Sent per rank, full mask: (N-1) KV, half each way; backward as much again for dk and dv.
"""

from __future__ import annotations

from tokenring.plans.problem import Problem
from tokenring.plans.step import Slot, Step, Transfer
from tokenring.schedules.paths import attend, block, carried
from tokenring.schedules.returns import Returns, key_returns

HALVES = (("a", 1), ("b", -1))
"""Name and way of the first and the second half."""


def biring(problem: Problem, rank: int) -> tuple[Step, ...]:
    """One rank's steps: N of them, with at most one half block out and one in each way."""
    queries = problem.own("q", rank)
    held: list[Slot] = []
    steps, home = [], ()
    for t in range(problem.world):
        moves = [_move(problem, rank, t, half) for half in (0, 1)] if t < problem.world - 1 else []
        if t == 0:
            computes = [attend(problem, queries, problem.own("kv", rank), "0")]
            back = key_returns(problem, rank, computes[0], "0", {})
        else:
            computes, back = [], Returns()
            for half, (name, way) in enumerate(HALVES):
                computes.append(attend(problem, queries, held[half], f"{t}{name}"))
                helper = (rank + way * t) % problem.world
                back += key_returns(problem, rank, computes[-1], f"{t}{name}", {helper: f"dkv{t}{name}"}, half)
        arriving = [slot for _, _, slot in moves]
        steps.append(
            Step(
                sends=(tuple(out for out, _, _ in moves if out), back.sends),
                receives=(tuple(into for _, into, _ in moves if into), back.receives),
                slots=tuple(slot for slot in arriving if slot.rows) + back.slots,
                computes=tuple(c for c in computes if c),
                merges=back.merges + home,
            )
        )
        held, home = arriving, tuple(s.name for s in back.slots)
    return (*steps, Step(merges=home))


def _move(problem: Problem, rank: int, t: int, half: int) -> tuple[Transfer | None, Transfer | None, Slot]:
    """One half on one step: what leaves, what comes, and the slot it comes to."""
    name, way = HALVES[half]
    world = problem.world
    ahead, behind = (rank + way) % world, (rank - way) % world
    source, target = ("kv" if t == 0 else f"kv{t}{name}"), f"kv{t + 1}{name}"
    owner, coming = (rank - way * t) % world, (behind - way * t) % world
    leaving = block("kv", target, owner, carried(problem, "kv", owner, way, t + 1, half))
    arriving = block("kv", target, coming, carried(problem, "kv", coming, way, t + 1, half))
    out = Transfer(rank, ahead, "kv", leaving.pieces, source, target) if leaving.rows else None
    into = Transfer(behind, rank, "kv", arriving.pieces, source, target) if arriving.rows else None
    return out, into, arriving

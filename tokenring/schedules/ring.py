"""Ring: keys and values travel one way round, queries stay (Liu et al., Ring Attention, arXiv 2310.01889).

    step 0      step 1      step 2            rank r holds the block of rank r - t on step t, computes on it
    KV0 KV1 KV2 KV2 KV0 KV1 KV1 KV2 KV0       and passes on what later ranks still want of it

Backward, dq stays with its queries and the block's dk and dv must come home. `ring:direct` sends each partial straight to the
owner, which adds them in float32 (one rounding a partial, none a hop).
Sent per rank, full mask: (N-1) KV forward, (N-1) (KV + dKV) backward.
"""

from __future__ import annotations

from tokenring.plan import Problem, Slot, Step, Transfer
from tokenring.schedules.paths import attend, block, carried, direction
from tokenring.schedules.returns import key_returns


def ring(problem: Problem, rank: int) -> tuple[Step, ...]:
    """One rank's steps: N of them, each with at most one block out and one in; backward one more for the last return."""
    world, way = problem.world, direction(problem, "kv")
    right, left = (rank + way) % world, (rank - way) % world
    queries, held = problem.own("q", rank), problem.own("kv", rank)
    steps, home = [], ()
    for t in range(world):
        owner, coming = (rank - way * t) % world, (left - way * t) % world
        sends = receives = ()
        arriving = Slot(f"kv{t + 1}", "kv", ())
        if t < world - 1:
            leaving = block("kv", f"kv{t + 1}", owner, carried(problem, "kv", owner, way)[t + 1])
            arriving = block("kv", f"kv{t + 1}", coming, carried(problem, "kv", coming, way)[t + 1])
            if leaving.rows:
                sends = (Transfer(rank, right, "kv", leaving.pieces, held.name, leaving.name),)
            if arriving.rows:
                receives = (Transfer(left, rank, "kv", arriving.pieces, "kv" if t == 0 else f"kv{t}", arriving.name),)
        compute = attend(problem, queries, held, t)
        back = key_returns(problem, rank, compute, t, {(rank + way * t) % world: f"dkv{t}"})
        steps.append(
            Step(
                sends=(sends, back.sends),
                receives=(receives, back.receives),
                slots=((arriving,) if receives else ()) + back.slots,
                computes=(compute,) if compute else (),
                merges=back.merges + home,
            )
        )
        held, home = arriving, tuple(s.name for s in back.slots)
    return (*steps, Step(merges=home)) if home else tuple(steps)

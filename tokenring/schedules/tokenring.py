"""TokenRing: queries travel one way round, their results go straight home, keys and values never move (arXiv 2412.20501).

    step 0        step 1                     step 2                              after the loop
    Q0 Q1 Q2  ->  Q1 Q2 Q0  (computed, then) Q2 Q0 Q1  while P(1) flies home ->  P(2) flies home, is merged

Query and result use opposite directions of a link. On a causal zigzag the query first visits the ranks before its owner,
which need all of it, then wraps, and only its late half goes on: `paths.carried` finds that, no case is written here.
Forward, Q is the query and P is (out, lse). Backward, Q is (q, do, lse, delta) and P is dq; dk and dv stay where their keys are.
Sent per rank, full mask: forward (N-1) (Q + O + L), backward (N-1) (2Q + 2L + dQ), L one float32 number a row and head.
"""

from __future__ import annotations

from tokenring.plans.problem import Problem
from tokenring.plans.step import Slot, Step, Transfer
from tokenring.schedules.direction import direction
from tokenring.schedules.paths import attend, block, carried, wanted


def tokenring(problem: Problem, rank: int) -> tuple[Step, ...]:
    """One rank's steps: N of compute, one more to merge the last return."""
    world, way = problem.world, direction(problem, "q")
    right, left = (rank + way) % world, (rank - way) % world
    held, values = problem.own("q", rank), problem.own("kv", rank)
    steps, home = [], ()
    for t in range(world):
        owner, coming = (rank - way * t) % world, (left - way * t) % world
        arriving, out_now, in_now = Slot(f"q{t + 1}", held.what, ()), (), ()
        if t < world - 1:
            leaving = block(held.what, f"q{t + 1}", owner, carried(problem, "q", owner, way, t + 1))
            arriving = block(held.what, f"q{t + 1}", coming, carried(problem, "q", coming, way, t + 1))
            if leaving.rows:
                out_now = (Transfer(rank, right, held.what, leaving.pieces, held.name, leaving.name),)
            if arriving.rows:
                in_now = (Transfer(left, rank, held.what, arriving.pieces, "q" if t == 0 else f"q{t}", arriving.name),)
        compute = attend(problem, held, values, t)
        returns_out, returns_in, landing = (), (), ()
        if t > 0:
            helper = (rank + way * t) % world
            back = block(problem.query_result, f"home{t}", rank, wanted(problem, "q", rank, helper))
            if compute:
                result = compute.results[0]
                returns_out = (Transfer(rank, owner, result.what, result.pieces, result.name, f"home{t}"),)
            if back.rows:
                sent = f"{problem.query_result}{t}"
                returns_in, landing = (Transfer(helper, rank, back.what, back.pieces, sent, back.name),), (back,)
        own = tuple(s.name for s in compute.results if t == 0 or s.what != problem.query_result) if compute else ()
        steps.append(
            Step(
                sends=(out_now, returns_out),
                receives=(in_now, returns_in),
                slots=((arriving,) if in_now else ()) + landing,
                computes=(compute,) if compute else (),
                merges=own + home,
            )
        )
        held, home = arriving, tuple(s.name for s in landing)
    return (*steps, Step(merges=home))

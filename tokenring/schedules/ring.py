"""Ring: keys and values travel one way round, queries stay (Liu et al., Ring Attention, arXiv 2310.01889).

    step 0      step 1      step 2            rank r holds the block of rank r - t on step t, computes on it
    KV0 KV1 KV2 KV2 KV0 KV1 KV1 KV2 KV0       and passes on what later ranks still want of it

Backward, dq stays with its queries and the block's dk and dv must come home:

    ring          dk and dv ride with their block in float32, each rank adds its share, and one more hop brings them home
    ring:direct   each partial goes straight to the owner, which adds them in float32 (one rounding a partial, none a hop)

Sent per rank, full mask: (N-1) KV forward; backward (N-1) KV + N dKV riding, (N-1) (KV + dKV) direct.
"""

from __future__ import annotations

from tokenring.plans.problem import Problem
from tokenring.plans.step import Compute, Slot, Step, Sum, Transfer
from tokenring.schedules.direction import direction
from tokenring.schedules.paths import Rows, attend, block, carried, reached, wanted
from tokenring.schedules.returns import Returns, key_returns


def ring(problem: Problem, rank: int) -> tuple[Step, ...]:
    """One rank's steps: N of them, each with at most one block out and one in, and one to merge the last return."""
    return _ring(problem, rank, riding=False)


def ring_riding(problem: Problem, rank: int) -> tuple[Step, ...]:
    """The backward steps of `ring`: partial gradients of keys and values travel with them."""
    return _ring(problem, rank, riding=problem.backward and problem.world > 1)


def _ring(problem: Problem, rank: int, riding: bool) -> tuple[Step, ...]:
    world, way = problem.world, direction(problem, "kv")
    right, left = (rank + way) % world, (rank - way) % world
    queries, held = problem.own("q", rank), problem.own("kv", rank)
    steps, home = [], ()
    for t in range(world):
        owner, coming = (rank - way * t) % world, (left - way * t) % world
        sends = receives = ()
        arriving = Slot(f"kv{t + 1}", "kv", ())
        if t < world - 1:
            leaving = block("kv", f"kv{t + 1}", owner, carried(problem, "kv", owner, way, t + 1))
            arriving = block("kv", f"kv{t + 1}", coming, carried(problem, "kv", coming, way, t + 1))
            if leaving.rows:
                sends = (Transfer(rank, right, "kv", leaving.pieces, held.name, leaving.name),)
            if arriving.rows:
                receives = (Transfer(left, rank, "kv", arriving.pieces, "kv" if t == 0 else f"kv{t}", arriving.name),)
        compute = attend(problem, queries, held, t)
        if riding:
            back, sums = _ride(problem, rank, way, t, compute)
        else:
            back, sums = key_returns(problem, rank, compute, t, {(rank + way * t) % world: f"dkv{t}"}), ()
        steps.append(
            Step(
                sends=(sends, back.sends),
                receives=(receives, back.receives),
                slots=((arriving,) if receives else ()) + back.slots,
                computes=(compute,) if compute else (),
                sums=sums,
                merges=back.merges + home,
            )
        )
        held = arriving
        home = tuple(s.name for s in back.slots if not riding or t == world - 1)
    return (*steps, Step(merges=home))


def _ride(problem: Problem, rank: int, way: int, t: int, compute: Compute | None) -> tuple[Returns, tuple[Sum, ...]]:
    """What rides on after step t: the sum that came with the block and the share made here."""
    world = problem.world
    right, left = (rank + way) % world, (rank - way) % world
    owner, coming = (rank - way * t) % world, (left - way * t) % world
    sums, sends, receives, slots = (), (), (), ()
    name, rows = _passenger(problem, owner, way, t)
    leaving = block("dkv", name, owner, rows)
    if name == f"sum{t}":
        sums = (Sum(leaving, (f"ride{t}", f"dkv{t}")),)
    if rows:
        sends = (Transfer(rank, right, "dkv", leaving.pieces, name, f"ride{t + 1}"),)
    name, rows = _passenger(problem, coming, way, t)
    arriving = block("dkv", f"ride{t + 1}", coming, rows)
    if rows:
        receives, slots = (Transfer(left, rank, "dkv", arriving.pieces, name, arriving.name),), (arriving,)
    own = tuple(s.name for s in compute.results if s.what != "dkv") if compute else ()
    return Returns(own, sends, receives, slots), sums


def _passenger(problem: Problem, owner: int, way: int, t: int) -> tuple[str, Rows]:
    """The name and rows of what leaves with the block of `owner` from the rank that it visits on step t."""
    made = wanted(problem, "kv", owner, (owner + way * t) % problem.world)
    came = reached(problem, "kv", owner, way, t - 1) if t else ()
    name = f"sum{t}" if made and came else f"ride{t}" if came else f"dkv{t}"
    return name, reached(problem, "kv", owner, way, t)

"""Gather: every rank sends its keys and values straight to all that want them, then one pass over the rest.

The own block is computed while the others arrive; they land in one workspace in global order, so that neighbouring blocks
are one tile however many ranks sent them (the all-gather of Llama 3, arXiv 2407.21783, without the padding).
Backward gathers again; dk and dv of the workspace go straight home, where they are summed in float32 (a reduce-scatter).
Sent per rank, full mask: (N-1) KV, in one step, backward (N-1) (KV + dKV); the workspace holds (N-1) KV.
"""

from __future__ import annotations

from tokenring.plans.problem import Problem
from tokenring.plans.step import Slot, Step, Transfer, pieces
from tokenring.schedules.paths import attend, in_order, wanted
from tokenring.schedules.returns import key_returns


def gather(problem: Problem, rank: int) -> tuple[Step, ...]:
    """One rank's steps: exchange beside the own block, then everything else."""
    peers = [p for p in range(problem.world) if p != rank]
    queries, own = problem.own("q", rank), problem.own("kv", rank)
    blocks = (piece for p in peers for piece in pieces(p, wanted(problem, "kv", p, rank)))
    workspace = Slot("kv:all", "kv", in_order(problem, "kv", tuple(blocks)))
    sends = tuple(
        Transfer(rank, p, "kv", pieces(rank, rows), "kv", "kv:all")
        for p in peers
        if (rows := wanted(problem, "kv", rank, p))
    )
    receives = tuple(
        Transfer(p, rank, "kv", pieces(p, rows), "kv", "kv:all")
        for p in peers
        if (rows := wanted(problem, "kv", p, rank))
    )
    near = attend(problem, queries, own, 0)
    far = attend(problem, queries, workspace, 1)
    first, second = (
        key_returns(problem, rank, near, 0, {}),
        key_returns(problem, rank, far, 1, dict.fromkeys(peers, "dkv1")),
    )
    steps = [
        Step(
            sends=(sends, ()),
            receives=(receives, ()),
            slots=(workspace,) if receives else (),
            computes=(near,) if near else (),
            merges=first.merges,
        )
    ]
    back = ((), second.sends), ((), second.receives)
    steps.append(Step(*back, slots=second.slots, computes=(far,) if far else (), merges=second.merges))
    return (*steps, Step(merges=tuple(s.name for s in second.slots)))

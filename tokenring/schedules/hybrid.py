"""Hybrid: one schedule between nodes, another inside each (the multi-node form of TokenRing, arXiv 2412.20501).

    hybrid:ring/tokenring@2     node 0: ranks 0 1       node 1: ranks 2 3
    round 0                     KV0 KV1 at rest         KV2 KV3 at rest         queries go round inside the node
    round 1                     KV2 KV3                 KV0 KV1                 rank r of a node passes to rank r of the next

Outside `ring` moves keys and values from node to node, outside `tokenring` queries. In each round the inner schedule runs
inside the node as if the rows that came were its own; the next node's rows travel meanwhile, on a lane of their own. Partials of
rows that came are summed here and go straight home. So only (nodes - 1) blocks a rank cross between nodes.
Sent per rank, full mask, ring outside, TokenRing inside, N = R w: between nodes (R-1) KV, inside R (w-1) (2Q + L).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from tokenring.layout import Layout
from tokenring.plans.problem import QUERY_KINDS, Problem
from tokenring.plans.step import Piece, Slot, Step, Sum, Transfer, cut
from tokenring.schedules.direction import direction
from tokenring.schedules.inside import Renaming, beside
from tokenring.schedules.paths import Rows, block, carried, wanted_by

MOVING = {"ring": "kv", "tokenring": "q"}
"""What each outer schedule moves between nodes."""


@dataclass(frozen=True)
class Hybrid:
    """The builder of hybrid:OUTER/INNER@SIZE."""

    outer: str
    inner: Callable[[Problem, int], tuple[Step, ...]]
    size: int

    def __call__(self, problem: Problem, rank: int) -> tuple[Step, ...]:
        """One rank's steps: those of the inner schedule for each node whose rows come by, and two to bring the last home."""
        return _Hybrid(self, problem, rank).steps()


class _Hybrid:
    def __init__(self, form: Hybrid, problem: Problem, rank: int) -> None:
        self.form, self.problem, self.rank, self.size = form, problem, rank, form.size
        self.what = MOVING[form.outer]
        self.nodes = problem.world // form.size
        self.node, self.index = divmod(rank, form.size)
        self.way = direction(problem, self.what, form.size)
        self.result = problem.query_result if self.what == "q" else "dkv" if problem.backward else None

    def steps(self) -> tuple[Step, ...]:
        steps: list[Step] = []
        tail, late = Step(), {}
        for t in range(self.nodes):
            *body, end, sources = self._round(t)
            late[len(steps) + 1] = tuple(s.name for s in tail.slots if s.name.startswith("back"))
            steps.append(beside(beside(tail, body[0]), self._outer(t)))
            steps += body[1:]
            tail = beside(end, self._home(t, sources))
        late[len(steps) + 1] = tuple(s.name for s in tail.slots if s.name.startswith("back"))
        steps += [tail, Step()]
        return tuple(replace(step, merges=step.merges + late.get(i, ())) for i, step in enumerate(steps))

    def _outer(self, t: int) -> Step:
        """What passes between nodes while round t is computed."""
        if t == self.nodes - 1:
            return Step()
        ahead, behind = (self._peer(self.node + self.way * d) for d in (1, -1))
        here, there = self._name(t), self._name(t + 1)
        leaving, coming = self._held(ahead, t + 1), self._held(self.rank, t + 1)
        sends = (Transfer(self.rank, ahead, leaving.what, leaving.pieces, here, there),) if leaving.rows else ()
        receives = (Transfer(behind, self.rank, coming.what, coming.pieces, here, there),) if coming.rows else ()
        return Step(((), (), sends), ((), (), receives), (coming,) if receives else ())

    def _home(self, t: int, sources: tuple[str, ...]) -> Step:
        """The partials of the rows that came in round t leave as one; that of this rank's own rows comes back."""
        if self.result is None or t == 0:
            return Step()
        owner, helper = (self._peer(self.node + d * self.way * t) for d in (-1, 1))
        name, back = f"home@{t}", f"back@{t}"
        leaving = block(self.result, name, owner, self._wanted(owner, self.node))
        coming = block(self.result, back, self.rank, self._wanted(self.rank, helper // self.size))
        sends = (Transfer(self.rank, owner, self.result, leaving.pieces, name, back),) if leaving.rows else ()
        receives = (Transfer(helper, self.rank, self.result, coming.pieces, name, back),) if coming.rows else ()
        sums = (Sum(leaving, sources),) if sources else ()
        return Step(((), sends), ((), receives), (coming,) if receives else (), sums=sums)

    def _round(self, t: int) -> tuple:
        """The inner schedule's steps in the names and ranks of the whole, and the partials of the rows that came."""
        inner = _inner_problem(self.form, self.problem, self.node, t)
        steps = self.form.inner(inner, self.index)
        slots = [s for step in steps for s in step.slots]
        slots += [s for step in steps for c in step.computes for s in c.results]
        slots += [total.target for step in steps for total in step.sums]
        kinds = {s.name: s.what for s in slots}
        came = [name for step in steps for name in step.merges if t and kinds[name] == self.result]
        kept = [replace(step, merges=tuple(n for n in step.merges if n not in came)) for step in steps]
        whole = Renaming(
            rank=lambda rank: self.node * self.size + rank,
            name=lambda name: self._inner_name(name, t),
            pieces=lambda what, inner: self._pieces(what, inner, t),
        )
        return (*map(whole.step, kept), tuple(self._inner_name(name, t) for name in came))

    def _inner_name(self, name: str, t: int) -> str:
        if name == self.what:
            return self._name(t)
        return name if name in ("q", "kv") else f"{t}/{name}"

    def _name(self, t: int) -> str:
        return self.what if t == 0 else f"{self.what}@{t}"

    def _pieces(self, what: str, inner: tuple[Piece, ...], t: int) -> tuple[Piece, ...]:
        moving = (what in QUERY_KINDS) == (self.what == "q")
        found: list[Piece] = []
        for piece in inner:
            owner = self.node * self.size + piece.owner
            if moving and t:
                found += cut(self._held(owner, t), ((piece.start, piece.stop),))
            else:
                found.append(replace(piece, owner=owner))
        return tuple(found)

    def _held(self, rank: int, t: int) -> Slot:
        return _held(self.form, self.problem, rank, t)

    def _peer(self, node: int) -> int:
        return node % self.nodes * self.size + self.index

    def _wanted(self, owner: int, node: int) -> Rows:
        return wanted_by(self.problem, self.what, owner, range(node * self.size, (node + 1) * self.size))


@lru_cache(maxsize=8192)
def _held(form: Hybrid, problem: Problem, rank: int, t: int) -> Slot:
    """The moving rows that a rank holds in round t."""
    what = MOVING[form.outer]
    if t == 0:
        return problem.own(what, rank)
    way = direction(problem, what, form.size)
    owner = (rank - way * t * form.size) % problem.world
    kind = problem.queries if what == "q" else "kv"
    return block(kind, f"{what}@{t}", owner, carried(problem, what, owner, way, t, size=form.size))


@lru_cache(maxsize=4096)
def _inner_problem(form: Hybrid, problem: Problem, node: int, t: int) -> Problem:
    """Round t of a node, as the inner schedule sees it: its ranks' own rows, and those that came as if they were."""
    ranks = range(node * form.size, (node + 1) * form.size)
    slots = {what: [problem.own(what, r) for r in ranks] for what in ("q", "kv")}
    slots[MOVING[form.outer]] = [_held(form, problem, r, t) for r in ranks]
    layouts = [
        Layout.of_any_runs([problem.segments(what, slot.pieces) for slot in slots[what]]) for what in ("q", "kv")
    ]
    return replace(problem, world=form.size, q_layout=layouts[0], kv_layout=layouts[1])

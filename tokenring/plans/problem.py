"""What a schedule is given: who holds which positions, which pairs count, how many heads there are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from tokenring.layout import Layout
from tokenring.mask import Mask
from tokenring.plans.step import Piece, Slot
from tokenring.segments import Range, Segment, Tile

QUERY_KINDS = ("q", "qd", "out", "dq")
"""Kinds of slots whose rows are queries and whose heads are query heads."""


@dataclass(frozen=True)
class Problem:
    """The input of every schedule; hashable."""

    world: int
    q_layout: Layout
    kv_layout: Layout
    mask: Mask
    direction: str = "forward"
    q_heads: int = 1
    kv_heads: int = 1
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self._parts))

    def __hash__(self) -> int:
        """Made once: building a plan looks up thousands of its parts by problem."""
        return self._hash

    def __reduce__(self) -> tuple:
        """Another process hashes text in its own way."""
        return Problem, self._parts

    @property
    def _parts(self) -> tuple:
        return self.world, self.q_layout, self.kv_layout, self.mask, self.direction, self.q_heads, self.kv_heads

    @cached_property
    def places(self) -> Problem:
        """The same positions and pairs without direction and heads, on which the rows that travel do not depend."""
        plain = replace(self, direction="forward", q_heads=1, kv_heads=1)
        return self if plain == self else plain

    @property
    def backward(self) -> bool:
        return self.direction == "backward"

    @property
    def queries(self) -> str:
        """What travels of queries: "q" forward, "qd" (q, do, lse, delta) backward."""
        return "qd" if self.backward else "q"

    @property
    def query_result(self) -> str:
        """What a compute gives for queries: "out" forward, "dq" backward."""
        return "dq" if self.backward else "out"

    def layout(self, what: str) -> Layout:
        """The layout of a kind of rows."""
        return self.q_layout if what in QUERY_KINDS else self.kv_layout

    def key_heads(self, heads: Range | None) -> Range | None:
        """The key heads that some query heads belong to."""
        if heads is None or heads[0] == heads[1]:
            return heads
        group = self.q_heads // self.kv_heads
        return heads[0] // group, -(-heads[1] // group)

    def segments(self, what: str, pieces: Iterable[Piece]) -> list[Segment]:
        """The position runs of pieces, in order."""
        layout = self.layout(what)
        return [run for piece in pieces for _, run in layout.cut(piece.owner, piece.start, piece.stop)]

    def tiles(self, q: Iterable[Piece], kv: Iterable[Piece]) -> tuple[Tile, ...]:
        """The tiles of a query slot against a key slot."""
        return self.mask.tiles(self.segments("q", q), self.segments("kv", kv))

    def own(self, what: str, rank: int) -> Slot:
        """A rank's own rows ("q" or "kv"), as the slot every plan starts with."""
        kind = self.queries if what == "q" else what
        return Slot(what, kind, (Piece(rank, 0, self.layout(what).length(rank)),))

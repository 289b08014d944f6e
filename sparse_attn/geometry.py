"""Which rows form a group, which keys are its anchor region, and which its candidates.

A document of n keys, groups of G = block * step positions; group g starts at position a = g * G:

    keys      |0 .. b-1|  b  ..  a-b-1  |a-b .. a-1|a .. a+G-1|
              | initial|   candidates   |  window  | own      |

Rows see the initial block, the window and their own group up to the diagonal exactly (the anchor region I and W of the paper,
section 3.2); a whole group shares one list of columns out of its candidates. Where initial block and window meet there is no
candidate. Groups lie at multiples of G in a document whatever chunk of it the queries are, so chunked prefill whose chunks end
at such multiples selects as one call does. Queries are the last rows of their document (bottom-right alignment).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from tokenring.segments import Range


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that share columns; all are row numbers of q (`rows`) and of k (the rest)."""

    rows: Range
    diagonal: int
    """The key of the first row's own position."""
    prefix: tuple[Range, ...]
    """Keys that every row sees: initial block and window, one range where they meet; none for a document's first rows."""
    candidates: Range
    document: int

    @property
    def count(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def prefix_keys(self) -> int:
        return sum(b - a for a, b in self.prefix)

    @property
    def candidate_keys(self) -> int:
        return self.candidates[1] - self.candidates[0]


@dataclass(frozen=True)
class Geometry:
    """All groups of a call; hashable."""

    documents: tuple[tuple[Range, Range], ...]
    """(query rows, key rows) of each."""
    block: int
    step: int
    initial: int
    """Keys of the initial block."""
    window: int
    """Keys before a group that all its rows see."""

    def __post_init__(self) -> None:
        for (qa, qb), (ka, kb) in self.documents:
            if qb - qa > kb - ka:
                raise ValueError(
                    f"a document has {qb - qa} queries and {kb - ka} keys; queries are its last rows, so give at least as "
                    "many keys as queries"
                )

    @classmethod
    def of(
        cls,
        documents: tuple[tuple[Range, Range], ...],
        block: int,
        step: int,
        initial: int | None = None,
        window: int | None = None,
    ) -> Geometry:
        """The paper's regions unless told otherwise: one block each."""
        return cls(documents, block, step, block if initial is None else initial, block if window is None else window)

    @property
    def rows(self) -> int:
        """Rows of a full group."""
        return self.block * self.step

    @property
    def queries(self) -> int:
        return self.documents[-1][0][1]

    @property
    def keys(self) -> int:
        return self.documents[-1][1][1]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """In the order of their rows."""
        return tuple(group for number in range(len(self.documents)) for group in self._groups(number))

    def _groups(self, number: int) -> Iterator[Group]:
        (row, last_row), (key, last_key) = self.documents[number]
        position = (last_key - key) - (last_row - row)
        while row < last_row:
            start = position - position % self.rows
            count = min(start + self.rows - position, last_row - row)
            edge = max(start - self.window, 0)
            initial = min(self.initial, edge)
            prefix = (
                ((key, key + initial), (key + edge, key + position)) if initial < edge else ((key, key + position),)
            )
            prefix = tuple(r for r in prefix if r[0] < r[1])
            yield Group((row, row + count), key + position, prefix, (key + initial, key + edge), number)
            row, position = row + count, position + count

    @property
    def causal_pairs(self) -> int:
        """Pairs of one head and batch entry that dense attention computes."""
        return sum(_causal(qb - qa, kb - ka) for (qa, qb), (ka, kb) in self.documents)

    @property
    def anchor_pairs(self) -> int:
        """Pairs of one head and batch entry inside the anchor region."""
        return sum(g.count * g.prefix_keys + g.count * (g.count + 1) // 2 for g in self.groups)

    @property
    def candidate_pairs(self) -> int:
        """Pairs of one head and batch entry that stripes choose from."""
        return sum(g.count * g.candidate_keys for g in self.groups)


@lru_cache(maxsize=128)
def geometry_of(documents: tuple[tuple[Range, Range], ...], block: int, step: int) -> Geometry:
    """`Geometry.of`, made once for calls that are alike, such as those of a model's layers."""
    return Geometry.of(documents, block, step)


def _causal(rows: int, keys: int) -> int:
    return rows * (keys - rows) + rows * (rows + 1) // 2


def documents_of(
    queries: int, keys: int, cu_seqlens: object | None, kv_cu_seqlens: object | None
) -> tuple[tuple[Range, Range], ...]:
    """(query rows, key rows) of each document that has queries, from cumulative lengths; one document where none are given."""
    if cu_seqlens is None:
        if kv_cu_seqlens is not None:
            raise ValueError(
                "kv_cu_seqlens was given without cu_seqlens; give both, or only cu_seqlens where they are alike"
            )
        return (((0, queries), (0, keys)),)
    q_cuts = _cuts("cu_seqlens", cu_seqlens, queries)
    k_cuts = _cuts("kv_cu_seqlens", cu_seqlens if kv_cu_seqlens is None else kv_cu_seqlens, keys)
    if len(q_cuts) != len(k_cuts):
        raise ValueError(
            f"cu_seqlens has {len(q_cuts) - 1} documents and kv_cu_seqlens {len(k_cuts) - 1}; give as many of both"
        )
    return tuple(zip(pairwise(q_cuts), pairwise(k_cuts)))


def _cuts(name: str, given: object, rows: int) -> list[int]:
    cuts = [int(n) for n in given]  # type: ignore[attr-defined]
    if not cuts or cuts[0] != 0 or cuts[-1] != rows or any(b < a for a, b in pairwise(cuts)):
        raise ValueError(f"{name} is {cuts}; it must rise from 0 to the {rows} rows of the sequence")
    return cuts

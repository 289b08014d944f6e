"""Which key a query may attend to, as interval algebra on global positions.

A mask is a list of disjoint *cells*: a range of query positions x a range of key positions x a band
`lower <= key position - query position <= upper`, for all batch entries or some.

    causal                     documents               spans (image blocks)      lengths
    one cell, upper = 0        one cell a document     causal, and above the     one cell for each run of batch
                                                       diagonal of each block    entries of equal length

An intersection meets cell by cell. A mask is cut to tiles over two lists of position runs; pairs of runs that it kills give
no tile, and so are neither computed nor sent.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from numbers import Integral

import torch
from torch import Tensor

from tokenring.runs import ascending, cell_tiles
from tokenring.segments import Segment, Tile, fuse, join

END = 1 << 62
"""Past every position."""

Numbers = Sequence[int] | Tensor


@dataclass(frozen=True)
class Limits:
    """What a mask says of the sequence itself: where it ends, how far it must reach, how many batch entries there are."""

    q_stop: int | None = None
    kv_stop: int | None = None
    reach: int = 0
    batch: int | None = None
    packed: bool = False
    """Queries and keys have packed axes of their own, which nothing aligns."""

    def __and__(self, other: Limits) -> Limits:
        both = {}
        for name in ("q_stop", "kv_stop", "batch"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and theirs is not None and mine != theirs:
                raise ValueError(f"two masks cannot be joined: one says {name} is {mine}, the other {theirs}")
            both[name] = theirs if mine is None else mine
        return Limits(**both, reach=max(self.reach, other.reach), packed=self.packed or other.packed)


@dataclass(frozen=True)
class Mask:
    """A hashable mask. Build one with the class methods; join two with `&`.

    >>> Mask.causal().dense(torch.arange(3), torch.arange(3)).int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """

    cells: tuple[Tile, ...]
    """Disjoint, in ascending order of their first query; rows are global positions here."""
    limits: Limits = Limits()
    _hash: int = field(init=False, repr=False, compare=False)
    _reach: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.cells, self.limits)))
        object.__setattr__(self, "_reach", tuple(accumulate((c.q_stop for c in self.cells), max)))

    def __hash__(self) -> int:
        """Made once: plans look their parts up by mask, and a packed batch has thousands of cells."""
        return self._hash

    def __reduce__(self) -> tuple:
        """Another process hashes None in its own way."""
        return Mask, (self.cells, self.limits)

    @classmethod
    def band(cls, lower: int | None, upper: int | None) -> Mask:
        """lower <= k - q <= upper; None leaves a side open."""
        return _band(lower, upper)

    @classmethod
    def causal(cls) -> Mask:
        """k <= q."""
        return cls.band(None, 0)

    @classmethod
    def full(cls) -> Mask:
        """Every key."""
        return cls.band(None, None)

    @classmethod
    def window(cls, left: int, right: int = 0) -> Mask:
        """q - left <= k <= q + right (flash-attention's convention; transformers' `sliding_window=W` is `left=W-1`)."""
        if not all(isinstance(n, int) and n >= 0 for n in (left, right)):
            raise ValueError(
                f"Mask.window got left={left!r}, right={right!r}; both count positions: integers of 0 or more"
            )
        return cls.band(-left, right)

    @classmethod
    def documents(cls, cu_seqlens: Numbers, kv_cu_seqlens: Numbers | None = None, causal: bool = True) -> Mask:
        """Documents packed in one sequence: document i holds positions cu_seqlens[i]..cu_seqlens[i+1]-1 and sees itself only.

        Args:
            cu_seqlens: from 0 to the sequence's length, not descending; an empty document is allowed.
            kv_cu_seqlens: where the keys are packed otherwise; causal then aligns the ends of each pair of documents
                (flash-attention's variable-length convention), and queries and keys have axes of their own from 0.
            causal: k <= q inside a document; False: all of it.

        >>> Mask.documents([0, 2, 3]).dense(torch.arange(3), torch.arange(3)).int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
        """
        q = _bounds("cu_seqlens", cu_seqlens)
        k = None if kv_cu_seqlens is None else _bounds("kv_cu_seqlens", kv_cu_seqlens)
        if k is not None and len(q) != len(k):
            raise ValueError(
                f"Mask.documents got {len(q) - 1} documents of queries and {len(k) - 1} of keys; give as many of both"
            )
        return _documents(tuple(q), k and tuple(k), causal)

    @classmethod
    def spans(cls, spans: Sequence[Sequence[int]] | Tensor) -> Mask:
        """Causal, and both ways inside each half-open (start, end): the image blocks of a multimodal sequence.

        >>> Mask.spans([(0, 2)]).dense(torch.arange(3), torch.arange(3)).int().tolist()
        [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
        """
        ends = sorted(_span(span) for span in spans)
        for (a, b), (after, _) in pairwise([*ends, (END, END)]):
            if not 0 <= a <= b <= after:
                raise ValueError(
                    f"Mask.spans got ({a}, {b}) before a span that starts at {after}; "
                    "spans are (start, end) with 0 <= start <= end, and must not overlap"
                )
        above = [Tile(a, b, a, b, lower=1) for a, b in ends]
        return cls(_sorted([Tile(0, END, 0, END, upper=0), *above]), Limits(reach=ends[-1][1] if ends else 0))

    @classmethod
    def lengths(cls, lengths: Numbers) -> Mask:
        """(B,): keys at or past lengths[b] are padding in batch entry b. Queries there attend to the keys that are none.

        >>> Mask.lengths([1, 2]).dense(torch.arange(1), torch.arange(2)).int().tolist()
        [[[1, 0]], [[1, 1]]]
        """
        given = _integers("lengths", lengths)
        if not given or min(given) < 0:
            raise ValueError(f"Mask.lengths got {given}; give one length of 0 or more for each batch entry")
        cells, at = [], 0
        for length, run in groupby(given):
            first, at = at, at + len(list(run))
            cells.append(Tile(0, END, 0, length, batch=(first, at)))
        return cls(_sorted(cells), Limits(reach=max(given), batch=len(given)))

    @classmethod
    def of(cls, mask: Mask | str) -> Mask:
        """A mask from its name or itself."""
        if isinstance(mask, Mask):
            return mask
        if isinstance(mask, str) and mask in ("causal", "full"):
            return cls.causal() if mask == "causal" else cls.full()
        given = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(
            f'mask is {given}; give "causal", "full" or a tokenring.Mask (mask tensors are never accepted: '
            "Mask.documents, spans, lengths and window say what they would, and can be cut over ranks)"
        )

    def __and__(self, other: Mask) -> Mask:
        """Pairs that both masks allow."""
        if self.limits.packed != other.limits.packed and any(
            (c.lower, c.upper) != (None, None) for c in self._loose(other)
        ):
            raise ValueError(
                "documents with kv_cu_seqlens cannot be joined with a causal mask, window or spans: queries and keys are packed on "
                "axes of their own, which such a mask would compare; give documents without kv_cu_seqlens, or causal=True"
            )
        cells = [both for a in self.cells for b in other.over(a.q_start, a.q_stop - 1) if (both := a.common(b))]
        return Mask(_sorted(cells), self.limits & other.limits)

    def _loose(self, other: Mask) -> tuple[Tile, ...]:
        """The cells of the one of two masks that is not packed."""
        return other.cells if self.limits.packed else self.cells

    @property
    def aligned(self) -> bool:
        """Whether the mask compares positions of queries and keys, so that where the two end matters."""
        return not self.limits.packed and any((c.lower, c.upper) != (None, None) for c in self.cells)

    def over(self, first: int, last: int) -> Iterator[Tile]:
        """The cells that hold some query position of first..last."""
        for index in range(bisect_right(self._reach, first), bisect_left(self.cells, last + 1, key=_q_start)):
            if self.cells[index].q_stop > first:
                yield self.cells[index]

    def dense(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """The boolean matrix (queries, keys), for tests and small cases; (batch, queries, keys) where entries differ."""
        q, k = q_positions[:, None], k_positions[None, :]
        shape = (q.shape[0], k.shape[1])
        allowed = torch.zeros(shape if self.limits.batch is None else (self.limits.batch, *shape), dtype=torch.bool)
        for cell in self.cells:
            here = (q >= cell.q_start) & (q < cell.q_stop) & (k >= cell.k_start) & (k < cell.k_stop)
            if cell.lower is not None:
                here &= k - q >= cell.lower
            if cell.upper is not None:
                here &= k - q <= cell.upper
            part = allowed if self.limits.batch is None or cell.batch is None else allowed[slice(*cell.batch)]
            part |= here
        return allowed

    def tiles(self, q: Sequence[Segment], k: Sequence[Segment]) -> tuple[Tile, ...]:
        """The fused tiles of two slots, given the position runs of their rows in order."""
        groups, k_row = [], 0
        for group in ascending(join(k)):
            groups.append((group, k_row))
            k_row += group.rows
        tiles: list[Tile] = []
        q_row = 0
        for run in join(q):
            for cell in self.over(run.start, run.last):
                rows = run.inside(cell.q_start, cell.q_stop)
                if rows[0] < rows[1]:
                    tiles += cell_tiles(run, q_row, rows, groups, cell)
            q_row += run.count
        return fuse(tiles)


@lru_cache(maxsize=256)
def _band(lower: int | None, upper: int | None) -> Mask:
    return Mask(_sorted([Tile(0, END, 0, END, lower, upper)]))


@lru_cache(maxsize=64)
def _documents(q: tuple[int, ...], k: tuple[int, ...] | None, causal: bool) -> Mask:
    """Made once for a packed batch: every layer of a model may build its mask anew."""
    pairs = zip(pairwise(q), pairwise(q if k is None else k))
    cells = [Tile(*a, *b, upper=b[1] - a[1] if causal else None) for a, b in pairs]
    return Mask(_sorted(cells), Limits(q[-1], (q if k is None else k)[-1], packed=k is not None))


def _q_start(cell: Tile) -> int:
    return cell.q_start


def _sorted(cells: Iterable[Tile]) -> tuple[Tile, ...]:
    trimmed = (cell.trim() for cell in cells)
    return tuple(sorted((c for c in trimmed if c), key=lambda c: (c.q_start, c.k_start, c.batch or (0, 0))))


def _integers(what: str, numbers: Numbers) -> list[int]:
    if isinstance(numbers, Tensor):
        if numbers.dim() != 1 or numbers.is_floating_point() or numbers.dtype == torch.bool:
            raise ValueError(f"{what} is a {numbers.dtype} tensor of {numbers.dim()} dims; give integers in one dim")
        return numbers.tolist()
    if any(not isinstance(n, Integral) for n in numbers):
        raise ValueError(f"{what} is {list(numbers)}; give integers")
    return [int(n) for n in numbers]


def _span(span: Numbers) -> tuple[int, int]:
    if not isinstance(span, (Tensor, Sequence)) or len(ends := _integers("a span", span)) != 2:
        raise ValueError(f"Mask.spans got {span!r}; give (start, end) pairs of integers")
    return ends[0], ends[1]


def _bounds(what: str, numbers: Numbers) -> list[int]:
    bounds = _integers(what, numbers)
    if len(bounds) < 2 or bounds[0] != 0 or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(
            f"{what} is {bounds}; give 0, the end of each document, not descending, the last the sequence's length"
        )
    return bounds

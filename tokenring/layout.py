"""Which global positions each rank holds: one object cuts, puts together, positions and labels.

A layout is, for each rank, a short list of affine runs of positions. Six tokens on two ranks:

    contiguous   rank 0: 0 1 2      rank 1: 3 4 5
    zigzag       rank 0: 0 1 5      rank 1: 2 3 4      (four chunks 01 23 4 5; rank r holds chunks r and 2N-1-r)
    striped      rank 0: 0 2 4      rank 1: 1 3 5
    balanced     blocks dealt so that a given mask costs every rank the same

Any length and any world; shards may be uneven or empty. Under a causal mask zigzag and striped give every rank the same
work (zigzag: ring-flash-attention and Megatron; striped: Brandon et al., arXiv 2311.09431), contiguous does not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tokenring.segments import Segment, join
from tokenring.transport import connect

NAMES = ("contiguous", "zigzag", "striped")


@dataclass(frozen=True, slots=True)
class Layout:
    """A hashable cut of `total` positions, the first of them `offset`, over `world` ranks.

    >>> Layout.zigzag(6, 2).positions(0).tolist()
    [0, 1, 5]
    """

    total: int
    world: int
    offset: int
    runs: tuple[tuple[Segment, ...], ...]
    name: str
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Without the runs, of which a thousand ranks have thousands: layouts of one name that differ in runs are rare.
        object.__setattr__(self, "_hash", hash((self.total, self.world, self.offset, self.name)))
        if self.total < 0 or self.world < 1 or self.offset < 0:
            raise ValueError(
                f"Layout got length={self.total}, world={self.world}, offset={self.offset}; "
                "length and offset must be 0 or more, world 1 or more"
            )

    def __hash__(self) -> int:
        """Made once: plans look their parts up by layout."""
        return self._hash

    def __reduce__(self) -> tuple:
        """Another process hashes text in its own way."""
        return Layout, (self.total, self.world, self.offset, self.runs, self.name)

    @classmethod
    def contiguous(cls, length: int, world: int, offset: int = 0) -> Layout:
        """Rank r holds the r-th of `world` runs, whose lengths differ by at most one."""
        return _contiguous(length, world, offset)

    @classmethod
    def zigzag(cls, length: int, world: int, offset: int = 0) -> Layout:
        """2N chunks whose lengths differ by at most one; rank r holds chunks r and 2N-1-r."""
        return _zigzag(length, world, offset)

    @classmethod
    def striped(cls, length: int, world: int, offset: int = 0, block: int = 1) -> Layout:
        """Blocks of `block` positions dealt out in turn."""
        if block < 1:
            raise ValueError(f"Layout.striped got block={block}; a block holds 1 position or more")
        return _striped(length, world, offset, block)

    @classmethod
    def balanced(cls, mask: Any, length: int, world: int, block: int = 128, offset: int = 0) -> Layout:
        """Blocks of `block` positions dealt out so that every rank has equal attention work under the mask, and equal rows.

        Args:
            mask: "causal", "full" or a Mask over these positions (documents, spans and lengths included).
            block: smaller evens the work better and cuts the tiles finer; the last block may be shorter.

        >>> Layout.balanced("causal", 8, 2, block=1).positions(0).tolist()
        [0, 3, 4, 7]
        """
        from tokenring.mask import Mask

        if block < 1 or length < 0 or world < 1:
            raise ValueError(
                f"Layout.balanced got length={length}, world={world}, block={block}; block and world must be 1 or more, "
                "length 0 or more"
            )
        return _balanced(Mask.of(mask), length, world, block).at(offset)

    @classmethod
    def from_runs(cls, runs: Sequence[Sequence[Segment]]) -> Layout:
        """Any cut, given each rank's runs of positions in local order; positions count from 0, none held twice.

        >>> Layout.from_runs([[Segment(0, 1), Segment(3, 1)], [Segment(1, 2)]]).positions(0).tolist()
        [0, 3]
        """
        frozen = _frozen(runs)
        if not _each_once([run for rank in frozen for run in rank]):
            raise ValueError(
                "Layout.from_runs got runs that leave positions out or hold some twice; together they must hold 0 to the last "
                "position, each once"
            )
        return cls.of_any_runs(frozen)

    @classmethod
    def of_any_runs(cls, runs: Sequence[Sequence[Segment]]) -> Layout:
        """Runs of any positions: what the ranks of a node hold for a while."""
        return _of_runs(_frozen(runs))

    @classmethod
    def of(cls, layout: Layout | str, local_length: int, world: int) -> Layout:
        """A layout from its name, where every rank holds `local_length` rows, or itself."""
        if isinstance(layout, Layout):
            return layout
        if layout not in NAMES:
            raise ValueError(f"layout is {layout!r}; give one of {', '.join(NAMES)} or a tokenring.Layout")
        return getattr(cls, layout)(local_length * world, world)

    def at(self, offset: int) -> Layout:
        """The same cut with its first position at `offset`."""
        return self if offset == self.offset else _moved(self, offset)

    @property
    def complete(self) -> bool:
        """Whether the ranks together hold `offset` and the `total` positions from there on, each once."""
        return _complete(self)

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """The runs of one rank in local row order."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank is {rank}; this layout has ranks 0 to {self.world - 1}")
        return self.runs[rank]

    def cut(self, rank: int, start: int, stop: int) -> list[tuple[int, Segment]]:
        """The runs of rows start..stop-1 of a rank, each with its first row."""
        runs, rows = self.segments(rank), _row_starts(self, rank)
        if start <= 0 and stop >= rows[-1]:
            return list(zip(rows, runs))
        found = []
        for index in range(max(0, bisect_right(rows, start) - 1), len(runs)):
            row = rows[index]
            if row >= stop:
                break
            first, last = max(start, row), min(stop, row + runs[index].count)
            if first < last:
                found.append((first, runs[index].cut(first - row, last - row)))
        return found

    def length(self, rank: int) -> int:
        """How many rows a rank holds."""
        return sum(s.count for s in self.segments(rank))

    def positions(self, rank: int) -> Tensor:
        """int64 (rows of the rank): the global position of each local row, in local order."""
        runs = [s.start + s.stride * torch.arange(s.count, dtype=torch.int64) for s in self.segments(rank)]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64)

    def shard(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """The rows of one rank, cut out of the whole `x` along `dim`."""
        if x.shape[dim] != self.total:
            raise ValueError(
                f"shard got {x.shape[dim]} rows in dim {dim} of {tuple(x.shape)}; this layout cuts {self.total}"
            )
        return x.index_select(dim, (self.positions(rank) - self.offset).to(x.device))

    def gather(self, x_local: Tensor, group: Any, dim: int = 1) -> Tensor:
        """The whole tensor on every rank, rows in global order. Differentiable: gradients are summed over the ranks."""
        runtime = connect(group)
        if runtime.world != self.world:
            raise ValueError(f"gather got a group of {runtime.world} ranks; this layout has {self.world}")
        if x_local.shape[dim] != self.length(runtime.rank):
            raise ValueError(
                f"gather got {x_local.shape[dim]} rows in dim {dim} on rank {runtime.rank}; "
                f"this layout gives that rank {self.length(runtime.rank)}"
            )
        return _Gather.apply(x_local, self, runtime, dim)

    def shard_labels(self, labels: Tensor, rank: int, ignore_index: int = -100) -> Tensor:
        """Next-token labels (B, S) shifted by one over the whole sequence, then cut: no label is lost at a shard's edge.

        >>> Layout.zigzag(4, 2).shard_labels(torch.tensor([[10, 11, 12, 13]]), 0).tolist()
        [[11, -100]]
        """
        shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], ignore_index)], dim=1)
        return self.shard(shifted, rank)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_local: Tensor, layout: Layout, runtime: Any, dim: int) -> Tensor:
        ctx.layout, ctx.runtime, ctx.dim = layout, runtime, dim
        parts = runtime.all_gather(x_local.detach().movedim(dim, 0).contiguous())
        order = torch.cat([layout.positions(r) for r in range(layout.world)]) - layout.offset
        whole = torch.empty_like(torch.cat(parts))
        whole[order.to(whole.device)] = torch.cat(parts)
        return whole.movedim(0, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        layout, runtime = ctx.layout, ctx.runtime
        shards = [layout.shard(grad, r, ctx.dim).contiguous() for r in range(layout.world)]
        total = torch.zeros_like(shards[runtime.rank])
        for part in runtime.all_to_all([s.movedim(ctx.dim, 0).contiguous() for s in shards]):
            total += part.movedim(0, ctx.dim)
        return total, None, None, None


@lru_cache(maxsize=64)
def _contiguous(length: int, world: int, offset: int) -> Layout:
    cuts = _cuts(length, world)
    runs = [[Segment(offset + cuts[r], cuts[r + 1] - cuts[r])] for r in range(world)]
    return Layout(length, world, offset, _frozen(runs), "contiguous")


@lru_cache(maxsize=64)
def _zigzag(length: int, world: int, offset: int) -> Layout:
    cuts = _cuts(length, 2 * world)
    chunk = [Segment(offset + cuts[c], cuts[c + 1] - cuts[c]) for c in range(2 * world)]
    runs = [[chunk[r], chunk[2 * world - 1 - r]] for r in range(world)]
    return Layout(length, world, offset, _frozen(runs), "zigzag")


@lru_cache(maxsize=64)
def _striped(length: int, world: int, offset: int, block: int) -> Layout:
    if block == 1:
        runs = [[Segment(offset + r, len(range(r, length, world)), world)] for r in range(world)]
    else:
        starts = range(0, length, block)
        runs = [[Segment(offset + s, min(block, length - s)) for s in starts[r::world]] for r in range(world)]
    return Layout(length, world, offset, _frozen(runs), f"striped({block})")


@lru_cache(maxsize=16)
def _balanced(mask: Any, length: int, world: int, block: int) -> Layout:
    from tokenring.balance import balanced_blocks

    runs = _frozen(balanced_blocks(mask, length, world, block))
    return Layout(length, world, 0, runs, f"balanced({block}, {hash(runs):x})")


@lru_cache(maxsize=4096)
def _of_runs(runs: tuple[tuple[Segment, ...], ...]) -> Layout:
    """Made once: the ranks of a node hold the same rows in many rounds, and equal layouts are compared run by run."""
    total = sum(s.count for rank in runs for s in rank)
    return Layout(total, len(runs), 0, runs, f"runs:{hash(runs):x}")


@lru_cache(maxsize=64)
def _moved(layout: Layout, offset: int) -> Layout:
    move = offset - layout.offset
    runs = [[replace(s, start=s.start + move) for s in rank] for rank in layout.runs]
    return replace(layout, offset=offset, runs=_frozen(runs))


@lru_cache(maxsize=8192)
def _row_starts(layout: Layout, rank: int) -> list[int]:
    return list(accumulate((run.count for run in layout.runs[rank]), initial=0))


@lru_cache(maxsize=256)
def _complete(layout: Layout) -> bool:
    return _each_once([run for rank in layout.at(0).runs for run in rank])


def _each_once(runs: list[Segment]) -> bool:
    if all(run.stride == 1 or run.count == 1 for run in runs):
        end = 0
        for run in sorted(runs, key=lambda run: run.start):
            if run.start != end:
                return False
            end = run.last + 1
        return True
    held = torch.cat([run.start + run.stride * torch.arange(run.count) for run in runs])
    return bool((held.sort().values == torch.arange(len(held))).all())


def _cuts(length: int, parts: int) -> list[int]:
    base, more = divmod(max(length, 0), max(parts, 1))
    return [p * base + min(p, more) for p in range(parts + 1)]


def _frozen(runs: Sequence[Sequence[Segment]]) -> tuple[tuple[Segment, ...], ...]:
    return tuple(tuple(join(rank)) for rank in runs)

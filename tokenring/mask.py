"""Which key a query may attend to, as interval algebra on global positions.

A mask here is a band: `lower <= key position - query position <= upper`, either bound absent. Causal is `upper = 0`, full has
no bound, a window of flash-attention's convention is `-left <= k - q <= right`. A mask is cut to tiles over two lists of
position runs; pairs of runs that it kills give no tile, and so are neither computed nor sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenring.runs import ascending, run_tiles
from tokenring.segments import Segment, Tile, fuse, join


@dataclass(frozen=True, slots=True)
class Mask:
    """A hashable mask. Build one with `causal()`, `full()` or `window()`; join two with `&`.

    >>> Mask.causal().dense(torch.arange(3), torch.arange(3)).int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """

    lower: int | None = None
    upper: int | None = None

    @classmethod
    def causal(cls) -> Mask:
        """k <= q."""
        return cls(upper=0)

    @classmethod
    def full(cls) -> Mask:
        """Every key."""
        return cls()

    @classmethod
    def window(cls, left: int, right: int = 0) -> Mask:
        """q - left <= k <= q + right (flash-attention's convention; transformers' `sliding_window=W` is `left=W-1`)."""
        if left < 0 or right < 0:
            raise ValueError(f"Mask.window got left={left}, right={right}; both count positions and must be 0 or more")
        return cls(lower=-left, upper=right)

    @classmethod
    def of(cls, mask: Mask | str) -> Mask:
        """A mask from its name or itself."""
        if isinstance(mask, Mask):
            return mask
        if mask == "causal":
            return cls.causal()
        if mask == "full":
            return cls.full()
        raise ValueError(
            f'mask is {mask!r}; give "causal", "full" or a tokenring.Mask (mask tensors are never accepted)'
        )

    def __and__(self, other: Mask) -> Mask:
        """Pairs that both masks allow."""
        lowers = [m.lower for m in (self, other) if m.lower is not None]
        uppers = [m.upper for m in (self, other) if m.upper is not None]
        return Mask(max(lowers, default=None), min(uppers, default=None))

    def dense(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """The boolean matrix (queries, keys), for tests and small cases."""
        difference = k_positions[None, :] - q_positions[:, None]
        allowed = torch.ones_like(difference, dtype=torch.bool)
        if self.lower is not None:
            allowed &= difference >= self.lower
        if self.upper is not None:
            allowed &= difference <= self.upper
        return allowed

    def tiles(self, q: Sequence[Segment], k: Sequence[Segment]) -> tuple[Tile, ...]:
        """The fused tiles of two slots, given the position runs of their rows in order."""
        groups = ascending(join(k))
        tiles: list[Tile] = []
        q_row = 0
        for q_run in join(q):
            k_row = 0
            for group in groups:
                tiles += [t.shift(q_row, k_row) for t in run_tiles(q_run, group, self.lower, self.upper)]
                k_row += group.rows
            q_row += q_run.count
        return fuse(tiles)

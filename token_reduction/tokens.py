"""Visual tokens as one packed, ragged value: several items (images, videos) behind each other, no padding.

    row     0 ........ n0-1 | n0 ........ n0+n1-1 | ...        cu_seqlens = [0, n0, n0+n1, ...]
    item 0: grid (T, h, w), n0 = T*h*w rows in raster order: frame by frame, line by line

Everything that has one entry per token (features, positions, channels) shares this one row index, so a reduction is made
once and applied to all of them. `TokenShard` is the same on one rank of several: some of the rows, and which ones.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Grid = tuple[tuple[int, int, int], ...]

CHANNELS = ("cls_attn", "cls_logits", "recv_attn", "keys", "queries", "text", "patches", "pixels", "planes")


def check_grid(grid: Any) -> Grid:
    """The grid as a tuple of (T, h, w) integers, one for each item.

    >>> check_grid([[2, 3, 4]])
    ((2, 3, 4),)
    """
    rows = grid.tolist() if isinstance(grid, Tensor) else grid
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise ValueError(f"grid is a list with one (frames, height, width) per item, got {grid!r}")
    if not all(isinstance(row, Sequence) and len(row) == 3 for row in rows):
        raise ValueError(f"grid needs (frames, height, width) for every item, got {grid!r}; one item is [(T, h, w)]")
    try:
        checked = tuple((operator.index(t), operator.index(h), operator.index(w)) for t, h, w in rows)
    except TypeError as error:
        raise ValueError(f"grid entries are whole numbers, got {grid!r}; nothing is rounded") from error
    if any(t < 0 or h < 1 or w < 1 for t, h, w in checked):
        raise ValueError(f"grid entries are frames >= 0, height >= 1, width >= 1, got {checked}")
    return checked


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """Packed visual tokens of one or more items, checked when made.

    Args:
        x: (N, D) floating features, items behind each other.
        cu_seqlens: items + 1 row offsets, from 0 to N, as a list or an integer tensor; kept as int64 on the CPU.
        grid: (T, h, w) of each item; T*h*w is the item's length. T = 0 is an item that has no rows.
        positions: (P, N) int64 position of each token on each axis, P = 1, or 3 for M-RoPE. Reductions never renumber it.
        channels: what some methods look at, by name, one entry per token: `cls_attn`, `recv_attn` (N,), or (N, layers) from
            shallow to deep: attention paid by [CLS], and by all rows on average; `cls_logits` (N,) or (N, heads) [CLS] query . key
            / sqrt(d) of the last layer, before its softmax; `keys`, `queries` of the encoder, (N, H, d)
            or (N, H d) with heads side by side; `patches` (N, C) before the projector; `pixels` (N, ...) in 0..1; `planes` (N, ...) or a
            list of such (DeepStack). And `text`, not per token: (m, D) for all items, or a list of one (m, D) per item.

    Raises: ValueError naming the field that does not fit.

    >>> tokens = VisualTokens(torch.zeros(8, 4), [0, 8], [(2, 2, 2)], torch.arange(8)[None])
    >>> tokens.lengths
    [8]
    """

    x: Tensor
    cu_seqlens: Tensor
    grid: Grid
    positions: Tensor
    channels: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "channels", _check_channels(self.channels))
        set_(self, "grid", check_grid(self.grid))
        set_(self, "cu_seqlens", _check_offsets(self.cu_seqlens, self.grid))
        _check_texts(self.channels, len(self.grid))
        total = _check_rows(self.x, self.positions, self.channels)
        if int(self.cu_seqlens[-1]) != total:
            raise ValueError(
                f"cu_seqlens ends at {int(self.cu_seqlens[-1])} but x has {total} rows; they must be equal"
            )

    @property
    def lengths(self) -> list[int]:
        """Tokens in each item."""
        return self.cu_seqlens.diff().tolist()

    def item(self, number: int) -> VisualTokens:
        """One item alone, as views. A shared `text` goes with every item."""
        first, last = int(self.cu_seqlens[number]), int(self.cu_seqlens[number + 1])
        channels = take_channels(self.channels, slice(first, last))
        if "text" in channels:
            channels["text"] = text_of(self.channels, number)
        return VisualTokens(
            self.x[first:last],
            torch.tensor([0, last - first]),
            (self.grid[number],),
            self.positions[:, first:last],
            channels,
        )

    def shard(self, global_index: Tensor) -> TokenShard:
        """The rows `global_index` (int64, ascending) as one rank of several would hold them."""
        index = global_index.to(self.x.device)
        return TokenShard(
            self.x[index],
            global_index,
            self.cu_seqlens,
            self.grid,
            self.positions[:, global_index.to(self.positions.device)],
            take_channels(self.channels, global_index),
        )


@dataclass(frozen=True, eq=False)
class TokenShard:
    """The rows of a packed batch that one rank holds: any set of rows, also none.

    Args:
        x: (n, D) features of this rank's rows; (0, D) where it has none.
        global_index: (n,) int64, strictly ascending: which rows of the whole batch these are. Together the ranks hold every
            row of the batch once.
        cu_seqlens, grid: of the *whole* batch, the same on every rank.
        positions: (P, n) int64 and channels: this rank's entries, `text` whole.

    >>> tokens = VisualTokens(torch.zeros(8, 4), [0, 8], [(2, 2, 2)], torch.arange(8)[None])
    >>> tokens.shard(torch.tensor([1, 4, 6])).bounds
    [0, 3]
    """

    x: Tensor
    global_index: Tensor
    cu_seqlens: Tensor
    grid: Grid
    positions: Tensor
    channels: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "channels", _check_channels(self.channels))
        set_(self, "grid", check_grid(self.grid))
        set_(self, "cu_seqlens", _check_offsets(self.cu_seqlens, self.grid))
        _check_texts(self.channels, len(self.grid))
        rows = _check_rows(self.x, self.positions, self.channels)
        index = self.global_index
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.shape != (rows,):
            raise ValueError(
                f"global_index is int64 with one entry for each of the {rows} rows of x, got {_kind(index)}"
            )
        set_(self, "global_index", index.to(self.x.device))
        if rows and (int(index[0]) < 0 or int(index[-1]) >= self.total or bool((index.diff() <= 0).any())):
            raise ValueError(
                f"global_index must rise strictly inside 0..{self.total - 1}, the rows of the whole batch; "
                "sort the rows and give global, not local, numbers"
            )

    @property
    def total(self) -> int:
        """Rows of the whole batch."""
        return int(self.cu_seqlens[-1])

    @property
    def bounds(self) -> list[int]:
        """items + 1 local row offsets: where each item's rows begin on this rank."""
        cuts = torch.searchsorted(self.global_index, self.cu_seqlens.to(self.global_index.device))
        return cuts.tolist()

    def find(self, global_rows: Tensor) -> Tensor:
        """Local row of each given global row, -1 where it is not here. int64 in, int64 out."""
        if self.global_index.numel() == 0:
            return torch.full_like(global_rows, -1)
        at = torch.searchsorted(self.global_index, global_rows).clamp_(max=self.global_index.numel() - 1)
        return torch.where(self.global_index[at] == global_rows, at, -1)


def whole(tokens: VisualTokens) -> TokenShard:
    """All rows of a batch as the shard of a world of one."""
    index = torch.arange(tokens.x.shape[0], device=tokens.x.device)
    return TokenShard(tokens.x, index, tokens.cu_seqlens, tokens.grid, tokens.positions, tokens.channels)


def take_channels(channels: Mapping[str, Any], rows: Any) -> dict[str, Any]:
    """The given rows (slice or int64 index) of every channel; `text` as it is."""

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows.to(value.device) if isinstance(rows, Tensor) else rows]
        return [take(part) for part in value]

    return {name: value if name == "text" else take(value) for name, value in channels.items()}


def text_of(channels: Mapping[str, Any], item: int) -> Tensor | None:
    """The text (m, D) that goes with an item, or None."""
    text = channels.get("text")
    return text if text is None or isinstance(text, Tensor) else text[item]


def _check_offsets(cu_seqlens: Any, grid: Grid) -> Tensor:
    offsets = torch.as_tensor(cu_seqlens)
    if offsets.dim() != 1 or offsets.dtype in (torch.bool,) or offsets.is_floating_point() or offsets.numel() < 2:
        raise ValueError(
            f"cu_seqlens is a list of items + 1 >= 2 whole row offsets that starts at 0, got {cu_seqlens!r}"
        )
    offsets = offsets.to("cpu", torch.int64)
    steps = offsets.diff().tolist()
    if int(offsets[0]) != 0 or min(steps) < 0:
        raise ValueError(f"cu_seqlens starts at 0 and never falls, got {offsets.tolist()}")
    if len(grid) != len(steps):
        raise ValueError(
            f"grid has {len(grid)} items but cu_seqlens has {len(steps)}; give one (T, h, w) for each item"
        )
    for number, ((t, h, w), length) in enumerate(zip(grid, steps, strict=True)):
        if t * h * w != length:
            raise ValueError(
                f"item {number} has {length} rows in cu_seqlens but its grid {t}x{h}x{w} has {t * h * w} cells; "
                "give the grid after merging, without class or separator tokens"
            )
    return offsets


def _check_rows(x: Any, positions: Any, channels: Any) -> int:
    """Fields that have one entry per row agree on how many rows there are; returns that number."""
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point() or x.shape[1] < 1:
        raise ValueError(f"x is a floating tensor (tokens, width), got {_kind(x)}")
    rows = x.shape[0]
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.dtype != torch.int64:
        raise ValueError(
            f"positions is an int64 tensor (axes, tokens), got {_kind(positions)}; one axis is positions[None]"
        )
    if positions.shape[1] != rows or positions.shape[0] not in (1, 3):
        raise ValueError(f"positions has shape {tuple(positions.shape)}, expected (1 or 3 axes, {rows} tokens as in x)")
    for name, value in channels.items():
        if name not in CHANNELS:
            raise ValueError(f"unknown channel {name!r}; channels are {', '.join(CHANNELS)}")
        parts = [value] if isinstance(value, Tensor) else value
        if name not in ("planes", "text") and not isinstance(value, Tensor):
            raise ValueError(
                f"channel {name} is a tensor, got {_kind(value)}; only planes may be a list of tensors, and text one per item"
            )
        for part in parts:
            if not isinstance(part, Tensor) or part.dim() < 1:
                raise ValueError(f"channel {name} holds tensors with one row per token, got {_kind(part)}")
            if name != "text" and part.shape[0] != rows:
                raise ValueError(f"channel {name} has {part.shape[0]} rows but x has {rows}; all share one row index")
    return rows


def _check_channels(channels: Any) -> Mapping[str, Any]:
    if channels is None:
        return {}
    if not isinstance(channels, Mapping):
        raise ValueError(f"channels is a mapping of names to tensors, got {_kind(channels)}")
    return channels


def _check_texts(channels: Mapping[str, Any], items: int) -> None:
    text = channels.get("text")
    if text is not None and not isinstance(text, Tensor) and len(text) != items:
        raise ValueError(
            f"channel text has {len(text)} entries for {items} items; give one (m, D) each, or one for all"
        )


def _kind(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__

"""One layer's key/value cache of a sequence that is spread over ranks: each rank keeps its own rows, and no other.

    cache = KVCache(group)
    chunk = cache.deal(T)                                    # a Layout of the next T positions: ranks stay balanced
    ...                                                      # q, k, v of this rank's rows of the chunk
    cache.append(k, v, chunk)
    out = cache.attention(q, chunk)                          # prefill, chunk by chunk

    cache.extend(k, v)                                       # then new tokens, the same on every rank: each has one owner
    out = cache.decode(q)

Which rank holds what is a Layout, a value that every rank works out alone. Whether queries or keys and values travel follows
from it: `schedule="auto"` moves the queries of a chunk of T on P cached tokens while T / (T + P) is below about Hkv / Hq.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenring.api import attention
from tokenring.caching.dealing import between, compacted, deal, joined
from tokenring.caching.decode import decode_attention
from tokenring.layout import Layout
from tokenring.mask import Mask
from tokenring.transport import connect


class KVCache:
    """This rank's rows of one layer, and which positions they and the other ranks' rows hold.

    Every rank makes the same calls with its own rows. Chunks are appended in order, so the next position always follows the
    last. Buffers grow by a share when they are full. No gradients flow through the cache.

    Args:
        group: ProcessGroup, 1-D DeviceMesh, LocalGroup or None.
        window: W where no query sees a key W or more positions before it (`Mask.window(W - 1)`): rows that the window has
            passed are dropped, at the latest when they are a quarter of it.
        reserve: rows for which this rank's buffers are made at once.
        block: rows, at least, by which full buffers grow; 1/32 of the rows where that is more.

    >>> cache = KVCache()
    >>> chunk = cache.deal(3)
    >>> cache.append(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 8), chunk)
    >>> cache.extend(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8))
    >>> cache.k.shape, cache.layout.positions(0).tolist()
    (torch.Size([1, 4, 2, 8]), [0, 1, 2, 3])
    """

    def __init__(self, group: Any = None, *, window: int | None = None, reserve: int = 0, block: int = 4) -> None:
        if (window is not None and window < 1) or reserve < 0 or block < 1:
            raise ValueError(
                f"KVCache got window={window}, reserve={reserve}, block={block}; window and block are 1 or more rows, reserve 0 or more"
            )
        runtime = connect(group)
        self.group, self.rank, self.world = group, runtime.rank, runtime.world
        self.window, self.reserve, self.block = window, reserve, block
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next chunk may start at any position."""
        self._layouts: tuple[Layout, ...] = ()
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    # -- what it holds -------------------------------------------------------------------------------------------------

    @property
    def k(self) -> Tensor:
        """(B, rows, Hkv, D): a view. Where entries hold unlike numbers, `lengths` says which of their rows are valid."""
        return self._buffers()[0][:, : self._rows()]

    @property
    def v(self) -> Tensor:
        """(B, rows, Hkv, Dv)."""
        return self._buffers()[1][:, : self._rows()]

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Of each batch entry, which rank holds which positions."""
        return self._layouts

    @property
    def layout(self) -> Layout:
        """Which rank holds which positions, the same in every batch entry."""
        if len(set(self._layouts)) > 1:
            raise ValueError(
                "the entries of this batch have unlike lengths, so no one layout cuts them; decode with layouts, and give new "
                "tokens whole, with extend"
            )
        return self._layouts[0] if self._layouts else Layout.contiguous(0, self.world)

    @property
    def lengths(self) -> Tensor:
        """int64 (B,): this rank's rows of each entry."""
        return torch.tensor([one.length(self.rank) for one in self._layouts], dtype=torch.int64)

    @property
    def positions(self) -> Tensor:
        """int64 (B, rows): the positions of this rank's rows; 0 behind the valid ones."""
        places = torch.zeros(len(self._layouts), self._rows(), dtype=torch.int64)
        for entry, one in enumerate(self._layouts):
            places[entry, : one.length(self.rank)] = one.positions(self.rank)
        return places

    @property
    def next_positions(self) -> list[int]:
        """Of each batch entry, the position that its next token takes."""
        return [one.offset + one.total for one in self._layouts]

    def nbytes(self) -> int:
        """Bytes of this rank's buffers, unused capacity included."""
        return sum(t.numel() * t.element_size() for t in (self._k, self._v) if t is not None)

    def slack_nbytes(self) -> int:
        """Of `nbytes()`, the bytes of rows that no entry uses yet."""
        return 0 if self._k is None else self.nbytes() * (self._k.shape[1] - self._rows()) // max(1, self._k.shape[1])

    # -- what comes in -------------------------------------------------------------------------------------------------

    def deal(self, count: int, *, at_least: int = 0) -> Layout:
        """The layout of the next `count` positions: with them all ranks hold equally many rows, within one.

        Args:
            at_least: rows of the chunk that every rank takes, however many it holds already.
        """
        whole = self.layout
        held = [whole.length(rank) for rank in range(self.world)]
        return deal(held, count, offset=whole.offset + whole.total, at_least=at_least)

    def append(self, k: Tensor, v: Tensor, layout: Layout, lengths: Sequence[int] | None = None) -> None:
        """This rank's rows of the next chunk.

        Args:
            k: (B, layout.length(rank), Hkv, D), v: (B, layout.length(rank), Hkv, Dv).
            layout: the cut of the chunk, from `deal` or any whose first position is the next one.
            lengths: (B,), how many of the chunk's tokens each entry has; those behind are padding and are not kept. The
                entries then have unlike lengths, and later tokens come whole, with `extend`.
        """
        if layout.world != self.world:
            raise ValueError(f"layout is for {layout.world} ranks and the group has {self.world}")
        self._check(k, v, layout.length(self.rank), f"layout {layout.name}")
        counts = None if lengths is None else [int(n) for n in lengths]
        if counts is not None and (len(counts) != k.shape[0] or not 0 <= min(counts) <= max(counts) <= layout.total):
            raise ValueError(f"lengths are {counts} for {k.shape[0]} entries of a chunk of {layout.total} tokens")
        before = self.layout if self._layouts else Layout.contiguous(0, self.world, layout.offset)
        after = joined(before, layout)
        self._layouts = self._layouts or (before,) * k.shape[0]
        if counts is None:
            self._trim(self._spare())
            self._put(slice(None), k, v, joined(self.layout, layout) if self.window else after)
        else:
            self._append_part(k, v, layout, before, counts)

    def _append_part(self, k: Tensor, v: Tensor, layout: Layout, before: Layout, counts: list[int]) -> None:
        chunks = [between(layout, layout.offset, layout.offset + n) for n in counts]
        self._make_room(before.length(self.rank) + max(chunk.length(self.rank) for chunk in chunks), k, v)
        for entry, chunk in enumerate(chunks):
            kept = (layout.positions(self.rank) < chunk.offset + chunk.total).nonzero().flatten().to(k.device)
            rows = (x[entry : entry + 1].index_select(1, kept) for x in (k, v))
            self._put(slice(entry, entry + 1), *rows, joined(before, chunk))

    def extend(self, k: Tensor, v: Tensor) -> None:
        """The next tokens of every entry, the same on every rank; each is kept by the rank that holds the fewest rows.

        Args:
            k: (B, T, Hkv, D), v: (B, T, Hkv, Dv).
        """
        self._check(k, v, k.shape[1] if k.dim() == 4 else 0, "the call")
        self._layouts = self._layouts or (self.layout,) * k.shape[0]
        self._trim(self._spare())
        alike = len(set(self._layouts)) == 1
        for here in [slice(None)] if alike else [slice(entry, entry + 1) for entry in range(k.shape[0])]:
            before = self._layouts[here][0]
            held = [before.length(rank) for rank in range(self.world)]
            chunk = deal(held, k.shape[1], offset=before.offset + before.total)
            self._put(here, *(chunk.shard(x[here], self.rank) for x in (k, v)), joined(before, chunk))

    def trim(self) -> None:
        """Drop the rows that the window has passed now. Like every call, on every rank alike."""
        self._trim(1)

    def select(self, entries: Sequence[int] | Tensor) -> None:
        """Only these batch entries, in this order, repeated where named twice: for beam search."""
        index = torch.as_tensor(entries, dtype=torch.int64)
        self._layouts = tuple(self._layouts[b] for b in index.tolist())
        if self._k is not None:
            self._k, self._v = (x.index_select(0, index.to(x.device)) for x in self._buffers())

    # -- what it is for ------------------------------------------------------------------------------------------------

    def attention(self, q: Tensor, layout: Layout, *, mask: Mask | str = "causal", **options: Any) -> Any:
        """Attention of a chunk that is in the cache already over all of it, queries cut over the ranks. Collective.

        Args:
            q: (B, layout.length(rank), Hq, D).
            layout: the cut of the chunk, as given to `append`.
            mask: as in `tokenring.attention`; documents end where the chunk ends.
            options: any other option of `tokenring.attention`.

        Returns:
            what `tokenring.attention` does: out (B, layout.length(rank), Hq, Dv); with `return_lse` also lse.
        """
        return attention(
            q,
            self.k,
            self.v,
            group=self.group,
            layout=layout,
            kv_layout=self.seen_by(layout, mask),
            mask=mask,
            **options,
        )

    def decode(self, q: Tensor, **options: Any) -> Any:
        """Attention of the newest tokens, the same on every rank; options as in `tokenring.decode_attention`. Collective."""
        return decode_attention(q, self.k, self.v, group=self.group, kv_layout=self.layouts, **options)

    def seen_by(self, layout: Layout, mask: Mask | str = "causal") -> Layout:
        """The `kv_layout` for a chunk: that of the cache, with less to plan where the mask lets the chunk see all before it."""
        if Mask.of(mask) not in (Mask.causal(), Mask.full()):
            return self.layout
        return compacted(self.layout, layout.offset)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _buffers(self) -> tuple[Tensor, Tensor]:
        if self._k is None or self._v is None:
            raise ValueError("the cache is empty and knows no shapes; append a chunk first")
        return self._k, self._v

    def _rows(self) -> int:
        return max((one.length(self.rank) for one in self._layouts), default=0)

    def _check(self, k: Tensor, v: Tensor, rows: int, who: str) -> None:
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or k.shape[1] != rows:
            raise ValueError(
                f"got k {tuple(k.shape)} and v {tuple(v.shape)} on rank {self.rank} of {self.world}; each must be (batch, rows, heads, "
                f"head dim), and {who} gives this rank {rows} rows"
            )
        for new, held in zip((k, v), (self._k, self._v)):
            if held is not None and (new.shape[0], *new.shape[2:], new.dtype) != (
                held.shape[0],
                *held.shape[2:],
                held.dtype,
            ):
                raise ValueError(
                    f"got rows {tuple(new.shape)} {new.dtype}; the cache holds {tuple(held.shape)} {held.dtype}: batch, heads, "
                    "head dim and dtype must be the same"
                )

    def _spare(self) -> int:
        return max(self.block, (self.window or 0) // 4)

    def _trim(self, at_least: int) -> None:
        """Drop rows that no later query sees, where some entry has `at_least` positions of them."""
        if self.window is None or self._k is None:
            return
        after = tuple(
            between(one, one.offset + one.total + 1 - self.window, one.offset + one.total) for one in self._layouts
        )
        if all(new.offset - old.offset < at_least for old, new in zip(self._layouts, after)):
            return
        rows = max(one.length(self.rank) for one in after)
        fresh = [x.new_empty(x.shape[0], rows, *x.shape[2:]) for x in self._buffers()]
        for entry, (old, new) in enumerate(zip(self._layouts, after)):
            kept = (old.positions(self.rank) >= new.offset).nonzero().flatten().to(self._k.device)
            for x, shorter in zip(self._buffers(), fresh):
                shorter[entry, : kept.numel()] = x[entry].index_select(0, kept)
        self._k, self._v = fresh
        self._layouts = after

    def _put(self, here: slice, k: Tensor, v: Tensor, after: Layout) -> None:
        """Rows behind those of some entries, which then have the layout `after`."""
        layouts = list(self._layouts)
        first = layouts[here][0].length(self.rank)
        self._make_room(first + k.shape[1], k, v)
        for buffer, new in zip(self._buffers(), (k, v)):
            buffer[here, first : first + k.shape[1]] = new.detach()
        layouts[here] = [after] * len(layouts[here])
        self._layouts = tuple(layouts)

    def _make_room(self, rows: int, k: Tensor, v: Tensor) -> None:
        capacity = 0 if self._k is None else self._k.shape[1]
        if self._k is not None and rows <= capacity:
            return
        rows = max(rows, self.reserve if self._k is None else capacity + max(self.block, capacity // 32))
        longer = [x.new_empty(len(self._layouts), rows, *x.shape[2:]) for x in (k, v)]
        for old, new in zip((self._k, self._v), longer):
            if old is not None:
                new[:, :capacity] = old
        self._k, self._v = longer

"""A transformers Cache that is spread over ranks: each rank keeps its own rows of every layer, and no other.

Eight prompt rows in zigzag order over two ranks, three decoded tokens, then a second prompt of five rows:

    rank 0:  0 1 6 7 | 8     10 | 11 15
    rank 1:  2 3 4 5 |     9    | 12 13 14

Later rows are dealt so that every rank holds equally many, within one (`tokenring.caching.dealing`). Every rank works that out
alone, so no message is needed. A layer with a sliding window drops the rows that the window has passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from tokenring.caching.cache import KVCache
from tokenring.caching.dealing import deal, joined
from tokenring.layout import Layout
from tokenring.transport import connect


class Ledger:
    """Which rank holds which row of the whole sequence, and how the rows that layers are taking in now are cut."""

    def __init__(self, first: Layout | None, rank: int, world: int) -> None:
        self.first, self.rank, self.world = first, rank, world
        self.restart()

    def restart(self) -> None:
        """Nothing is held."""
        self.whole = Layout.contiguous(0, self.world, 0 if self.first is None else self.first.offset)
        self.coming = self.first
        self.chunk: Layout | None = None

    @property
    def stop(self) -> int:
        """The position of the next row."""
        return self.whole.offset + self.whole.total

    def held(self) -> list[int]:
        """Rows of each rank."""
        return [self.whole.length(rank) for rank in range(self.world)]

    def deal(self, count: int, at_least: int = 0) -> Layout:
        """The cut of the next `count` rows that keeps ranks balanced."""
        return deal(self.held(), count, offset=self.stop, at_least=at_least)

    def expect(self, chunk: Layout | None) -> None:
        """How the next rows are cut; None: new tokens that are dealt."""
        if chunk is not None and not self.whole.total:
            self.whole = Layout.contiguous(0, self.world, chunk.offset)
        self.coming = chunk

    def chunk_for(self, at: int, rows: int) -> Layout:
        """The cut of what a layer that has seen `at` rows was handed `rows` rows of: this rank's own, or all."""
        if self.whole.offset + at == self.stop:
            chunk = self.coming or self.deal(rows)
        elif self.chunk is not None and self.whole.offset + at == self.chunk.offset:
            chunk = self.chunk
        else:
            raise ValueError(
                f"a layer has {at} rows where others have {self.whole.total}; every layer must see every token: start a new "
                "SpreadCache"
            )
        if rows not in (chunk.length(self.rank), chunk.total):
            raise ValueError(
                f"SpreadCache got {rows} prompt rows on rank {self.rank}; its layout gives this rank {chunk.length(self.rank)}: "
                "cut the prompt with layout.shard"
            )
        if chunk is not self.chunk:
            self.whole, self.chunk, self.coming = joined(self.whole, chunk), chunk, None
        return chunk


class SpreadLayer(CacheLayerMixin):
    """One layer: `store` holds this rank's rows, `keys` and `values` show them as (B, Hkv, rows, D)."""

    is_croppable = False
    supports_early_init = False

    def __init__(self, ledger: Ledger, store: KVCache) -> None:
        super().__init__()
        self._ledger = ledger
        self.store = store
        self.is_sliding = store.window is not None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """What is known before any row is stored."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in this rank's rows of a prompt, or rows that are the same on every rank, of which it keeps its own.

        Returns what attention is to read: the new states of the first prompt, later all rows that this rank holds.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, first = key_states.shape[2], self.seen == 0
        chunk = self._ledger.chunk_for(self.seen, rows)
        states = (key_states.transpose(1, 2), value_states.transpose(1, 2))
        mine = rows == chunk.length(self._ledger.rank)
        self.store.append(*(x if mine else chunk.shard(x, self._ledger.rank) for x in states), chunk)
        self.seen += chunk.total
        self.show()
        return (key_states, value_states) if first and mine else (self.keys, self.values)

    def show(self) -> None:
        """Let `keys` and `values` show what the store holds now."""
        self.keys, self.values = self.store.k.transpose(1, 2), self.store.v.transpose(1, 2)

    def trim(self) -> None:
        """Drop what the sliding window has passed, if there is one."""
        self.store.trim()
        self.show()

    def get_seq_length(self) -> int:
        """Rows of the whole sequence that this layer has seen, on all ranks together."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) of a mask: the rank's own rows in the prompt, the whole sequence afterwards."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: rows of a spread cache cannot be taken back."""
        if tokens_to_remove:
            raise ValueError(
                f"SpreadCache cannot remove {tokens_to_remove} tokens; start a new SpreadCache and prefill again"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """These batch entries in place of those."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these batch entries."""
        if self.is_initialized:
            self.store.select(indices)
            self.show()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every batch entry several times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything; the next update is a prompt again."""
        self.store.reset()
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = 0


class SpreadCache(Cache):
    """Keys and values of a sequence that is cut over the ranks of `group`.

    Give it to a model inside `sequence_parallel` as `past_key_values`. The first forward stores this rank's rows of the
    prompt; each later forward brings new rows, the same on every rank or cut as `deal` says.

    Args:
        layout: the cut of the prompt (its `total` is the prompt's length after reduction, not the positions' range); None
            where prompts are given whole, and dealt as they come.
        group: ProcessGroup, 1-D DeviceMesh, LocalGroup or None, as in `tokenring.attention`.
        block: rows, at least, by which full buffers grow for decoded tokens (1/32 of the rows where that is more). The
            prompt itself has no slack.

    >>> cache = SpreadCache(Layout.contiguous(4, 1), None)
    >>> _ = cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    >>> cache.get_seq_length(), cache.nbytes()
    (4, 512)
    """

    def __init__(self, layout: Layout | None, group: Any, *, block: int = 4) -> None:
        runtime = connect(group)
        if layout is not None and layout.world != runtime.world:
            raise ValueError(f"SpreadCache got a layout for {layout.world} ranks and a group of {runtime.world}")
        if block < 1:
            raise ValueError(f"SpreadCache got block={block}; the buffers grow by 1 row or more")
        self.layout, self.group, self.block = layout, group, block
        self.ledger = Ledger(layout, runtime.rank, runtime.world)
        self.windows: Mapping[int, int] = {}
        """Of layers with a sliding window, how many positions it spans; `sequence_parallel` fills it in."""
        self.cuts: dict[int, Layout] = {}
        """The layouts of `sequence_parallel` blocks whose rows are in, by their first position."""
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `SpreadLayer.update`."""
        while len(self.layers) <= layer_idx:
            store = KVCache(self.group, window=self.windows.get(len(self.layers)), block=self.block)
            self.layers.append(SpreadLayer(self.ledger, store))
        return self.layers[layer_idx].update(key_states, value_states)

    @property
    def prefilled(self) -> bool:
        """Whether any rows are in."""
        return any(layer.is_initialized for layer in self.layers)

    def deal(self, count: int) -> Layout:
        """The cut of the next `count` rows after which all ranks hold equally many, within one; none gets none.

        Cut a further prompt with it, and enter `sequence_parallel(model, group, cache.deal(count))` for it.
        """
        return self.ledger.deal(count, at_least=1)

    def local(self, layer_idx: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `tokenring.decode_attention` reads of one layer on this rank.

        Returns:
            keys (B, S, Hkv, D), values (B, S, Hkv, Dv), lengths (B,) int64 valid rows, positions (B, S) int64: the row's
            place in the whole sequence (not the position its RoPE used, which may have gaps after reduction).
        """
        store = self.layers[layer_idx].store
        return store.k, store.v, store.lengths, store.positions

    def rows(self) -> list[int]:
        """Rows that each rank has been given; what a sliding window has passed is counted too."""
        return self.ledger.held()

    def nbytes(self) -> int:
        """Bytes of every tensor this rank holds for the cache, unused capacity included."""
        return sum(layer.store.nbytes() for layer in self.layers)

    def slack_nbytes(self) -> int:
        """Of `nbytes()`, the bytes of rows that are allocated and not yet used."""
        return sum(layer.store.slack_nbytes() for layer in self.layers)

    def reset(self) -> None:
        """Forget everything and start with a prompt again."""
        super().reset()
        self.ledger.restart()
        self.cuts.clear()

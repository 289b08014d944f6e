"""A transformers Cache that is spread over ranks: each rank keeps its own rows of every layer, and no other.

Eight prompt rows in zigzag order over two ranks, then three decoded tokens (d8, d9, d10):

    rank 0:  0 1 6 7 | d8     d10
    rank 1:  2 3 4 5 |     d9

A decoded token goes to the rank that holds the fewest rows, the lowest rank where several do. Every rank can work that
out alone, so no message is needed and the ranks stay balanced to one row.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from tokenring.layout import Layout
from tokenring.transport import connect


class Ledger:
    """Which rank holds which row of the global sequence: the same on every rank, without talking."""

    def __init__(self, layout: Layout, rank: int, block: int) -> None:
        self.layout, self.rank, self.block = layout, rank, block
        self.restart()

    def restart(self) -> None:
        """Back to the prompt alone."""
        self.counts = [self.layout.length(r) for r in range(self.layout.world)]
        self.slots: list[int | None] = []  # of each decoded token: its local row here, None where another rank owns it
        self.positions = self.layout.positions(self.rank)

    @property
    def total(self) -> int:
        """Rows of the whole sequence, decoded tokens included."""
        return self.layout.total + len(self.slots)

    def grow_to(self, total: int) -> None:
        """Give every decoded token up to `total` an owner."""
        while self.total < total:
            owner = self.counts.index(min(self.counts))
            self.slots.append(self.counts[owner] if owner == self.rank else None)
            if owner == self.rank:
                self._note(self.counts[owner], self.layout.offset + self.total - 1)
            self.counts[owner] += 1

    def more(self, rows: int) -> int:
        """By how many rows a full buffer grows: a share, so that long caches are seldom copied, small against 5%."""
        return max(self.block, rows // 32)

    def _note(self, slot: int, position: int) -> None:
        if slot == self.positions.numel():
            self.positions = torch.cat([self.positions, self.positions.new_zeros(self.more(slot))])
        self.positions[slot] = position


class SpreadLayer(CacheLayerMixin):
    """One layer's keys and values of this rank's rows, (B, Hkv, capacity, D); rows past `rows` are unused capacity."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger
        self.rows = 0
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty buffers like these states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0].contiguous(), value_states[:, :, :0].contiguous()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """First call: this rank's rows of the prompt. Later: new tokens, the same on every rank; the owner keeps each.

        Returns what attention is to read: the new states of the prompt, later all rows this rank holds.
        """
        if self.is_initialized:
            self._append(key_states, value_states)
            return self.keys[:, :, : self.rows], self.values[:, :, : self.rows]
        expected = self._ledger.layout.length(self._ledger.rank)
        if key_states.shape[2] != expected:
            raise ValueError(
                f"SpreadCache got {key_states.shape[2]} prompt rows on rank {self._ledger.rank}; its layout gives this "
                f"rank {expected}: cut the prompt with layout.shard"
            )
        self.lazy_initialization(key_states, value_states)
        # A copy without strides: the projections' outputs would otherwise stay alive behind a view.
        self.keys = key_states.detach().clone(memory_format=torch.contiguous_format)
        self.values = value_states.detach().clone(memory_format=torch.contiguous_format)
        self.rows, self.seen = expected, self._ledger.layout.total
        return key_states, value_states

    def _append(self, keys: Tensor, values: Tensor) -> None:
        first = self.seen - self._ledger.layout.total
        self.seen += keys.shape[2]
        self._ledger.grow_to(self.seen)
        for token, slot in enumerate(self._ledger.slots[first : first + keys.shape[2]]):
            if slot is None:
                continue
            if slot == self.keys.shape[2]:
                self.keys, self.values = self._longer(self.keys), self._longer(self.values)
            self.keys[:, :, slot] = keys[:, :, token]
            self.values[:, :, slot] = values[:, :, token]
            self.rows = slot + 1

    def _longer(self, buffer: Tensor) -> Tensor:
        b, h, s, d = buffer.shape
        longer = buffer.new_zeros(b, h, s + self._ledger.more(s), d)
        longer[:, :, :s] = buffer
        return longer

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

    def reset(self) -> None:
        """Forget everything; the next update is a prompt again."""
        self.keys = self.values = None
        self.is_initialized = False
        self.rows = self.seen = 0


class SpreadCache(Cache):
    """Keys and values of a sequence that is cut over the ranks of `group` as `layout` says.

    Give it to a model inside `sequence_parallel` as `past_key_values`. The first forward stores this rank's rows of the
    prompt; each later forward brings new tokens, the same on every rank, and each is kept by one owner.

    Args:
        layout: the cut of the prompt (its `total` is the prompt's length after reduction, not the positions' range).
        group: ProcessGroup, 1-D DeviceMesh, LocalGroup or None, as in `tokenring.attention`.
        block: rows, at least, by which full buffers grow for decoded tokens (1/32 of the rows where that is more). The
            prompt itself has no slack.

    >>> cache = SpreadCache(Layout.contiguous(4, 1), None)
    >>> _ = cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    >>> cache.get_seq_length(), cache.nbytes()
    (4, 544)
    """

    def __init__(self, layout: Layout, group: Any, *, block: int = 4) -> None:
        runtime = connect(group)
        if layout.world != runtime.world:
            raise ValueError(f"SpreadCache got a layout for {layout.world} ranks and a group of {runtime.world}")
        if block < 1:
            raise ValueError(f"SpreadCache got block={block}; the buffers grow by 1 row or more")
        self.layout, self.group = layout, group
        self._ledger = Ledger(layout, runtime.rank, block)
        super().__init__(layer_class_to_replicate=partial(SpreadLayer, self._ledger))

    @property
    def prefilled(self) -> bool:
        """Whether the prompt is in."""
        return any(layer.is_initialized for layer in self.layers)

    def local(self, layer_idx: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `tokenring.decode_attention` reads of one layer on this rank.

        Returns:
            keys (B, S, Hkv, D), values (B, S, Hkv, Dv), lengths (B,) int64 valid rows, positions (B, S) int64: the row's
            place in the whole sequence (not the position its RoPE used, which may have gaps after reduction).
        """
        layer = self.layers[layer_idx]
        batch, capacity = layer.keys.shape[0], layer.keys.shape[2]
        lengths = torch.full((batch,), layer.rows, dtype=torch.int64, device=layer.keys.device)
        positions = self._ledger.positions[:capacity].to(layer.keys.device).expand(batch, -1)
        return layer.keys.transpose(1, 2), layer.values.transpose(1, 2), lengths, positions

    def rows(self) -> list[int]:
        """Rows that each rank holds now."""
        return list(self._ledger.counts)

    def nbytes(self) -> int:
        """Bytes of every tensor this rank holds for the cache, unused capacity included."""
        tensors = [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in [*tensors, self._ledger.positions])

    def slack_nbytes(self) -> int:
        """Of `nbytes()`, the bytes of rows that are allocated and not yet used."""
        slack = 0
        for layer in self.layers:
            for t in (layer.keys, layer.values) if layer.is_initialized else ():
                slack += (t.shape[2] - layer.rows) * t.shape[0] * t.shape[1] * t.shape[3] * t.element_size()
        unused = self._ledger.positions.numel() - self._ledger.counts[self._ledger.rank]
        return slack + unused * self._ledger.positions.element_size()

    def reset(self) -> None:
        """Forget everything and start with a prompt again."""
        super().reset()
        self._ledger.restart()

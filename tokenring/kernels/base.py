"""The block kernel protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenring.merge import accumulator_dtype, merge_
from tokenring.segments import Tile, union


class BlockKernel(ABC):
    """Attention over a list of tiles. A back end implements `block`, or `forward` to answer the whole list with one call."""

    name: str

    @abstractmethod
    def refuses(self, q: Tensor, v: Tensor, softcap: float | None) -> str | None:
        """Why this kernel cannot take the inputs; None if it can."""

    @abstractmethod
    def block(
        self, q: Tensor, k: Tensor, v: Tensor, lower: int | None, upper: int | None, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """One rectangle of at least one query and one key, every query with at least one key.

        Args:
            q: (B, Sq, Hq, D). k: (B, Sk, Hkv, D). v: (B, Sk, Hkv, Dv).
            lower, upper: bounds on key index - query index inside the rectangle.

        Returns:
            out (B, Sq, Hq, Dv) in q's dtype, lse (B, Hq, Sq) in float32 (float64 for float64).
        """

    @abstractmethod
    def block_backward(
        self,
        queries: tuple[Tensor, ...],
        k: Tensor,
        v: Tensor,
        lower: int | None,
        upper: int | None,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of one rectangle, a share of those of the whole rows and keys.

        Args:
            queries: q and do (B, Sq, Hq, D or Dv), lse and delta = rowsum(do * out) (B, Hq, Sq) of the whole rows; then out
                of the whole rows, like do, where the rows never left their rank.
            k, v, lower, upper: as in `block`.

        Returns:
            dq, dk, dv of the shapes of q, k, v, in q's dtype or the accumulator's.
        """

    def backward(
        self,
        queries: tuple[Tensor, ...],
        kv: tuple[Tensor, ...],
        tiles: Sequence[Tile],
        rows: tuple[int, int],
        keys: tuple[int, int],
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query rows `rows` and key rows `keys` over all tiles; what no tile holds gives zeros."""
        with torch.autocast(queries[0].device.type, enabled=False):
            if len(tiles) == 1 and tiles[0].batch is None and tiles[0].spans(rows, keys):
                return self._tile_backward(queries, kv, tiles[0], scale, softcap)
            dtype = accumulator_dtype(queries[0].dtype)
            dq = torch.zeros_like(queries[0][:, slice(*rows)], dtype=dtype)
            dk, dv = (torch.zeros_like(x[:, slice(*keys)], dtype=dtype) for x in kv)
            for tile in tiles:
                batch = slice(None) if tile.batch is None else slice(*tile.batch)
                parts = self._tile_backward(queries, kv, tile, scale, softcap)
                dq[batch, tile.q_start - rows[0] : tile.q_stop - rows[0]] += parts[0]
                dk[batch, tile.k_start - keys[0] : tile.k_stop - keys[0]] += parts[1]
                dv[batch, tile.k_start - keys[0] : tile.k_stop - keys[0]] += parts[2]
        return dq, dk, dv

    def _tile_backward(
        self, queries: tuple[Tensor, ...], kv: tuple[Tensor, ...], tile: Tile, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        corner = tile.shift(-tile.q_start, -tile.k_start)
        batch = slice(None) if tile.batch is None else slice(*tile.batch)
        q_rows, k_rows = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
        q, do, lse, delta, *out = queries
        mine = (q[batch, q_rows], do[batch, q_rows], lse[batch, :, q_rows], delta[batch, :, q_rows])
        mine += tuple(x[batch, q_rows] for x in out)
        k, v = (x[batch, k_rows] for x in kv)
        return self.block_backward(mine, k, v, corner.lower, corner.upper, scale, softcap)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Sequence[Tile],
        rows: tuple[int, int],
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Query rows `rows` of the slot q over all tiles; a row that no tile holds gives zeros and lse -inf."""
        # Scores and lse are float32 by contract; an autocast region round the call must not make them 16-bit.
        with torch.autocast(q.device.type, enabled=False):
            return self._forward(q, k, v, tiles, rows, scale, softcap)

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Sequence[Tile],
        rows: tuple[int, int],
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        first, last = rows
        if len(tiles) == 1 and tiles[0].batch is None and (tiles[0].q_start, tiles[0].q_stop) == rows:
            return self._tile(q, k, v, tiles[0], scale, softcap)
        dtype = accumulator_dtype(q.dtype)
        out = torch.zeros(q.shape[0], last - first, q.shape[2], v.shape[3], dtype=dtype, device=q.device)
        lse = torch.full((q.shape[0], q.shape[2], last - first), -torch.inf, dtype=dtype, device=q.device)
        written: dict[tuple[int, int] | None, tuple[tuple[int, int], ...]] = {}
        for tile in tiles:
            batch = slice(None) if tile.batch is None else slice(*tile.batch)
            here = slice(tile.q_start - first, tile.q_stop - first)
            part_out, part_lse = self._tile(q, k, v, tile, scale, softcap)
            before = written.get(tile.batch, ())
            if any(a < tile.q_stop and tile.q_start < b for a, b in before):
                merge_(out[batch, here], lse[batch, :, here], part_out, part_lse)
            else:
                out[batch, here] = part_out.to(dtype)
                lse[batch, :, here] = part_lse
            written[tile.batch] = union((*before, (tile.q_start, tile.q_stop)))
        return out, lse

    def _tile(
        self, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        corner = tile.shift(-tile.q_start, -tile.k_start)
        batch = slice(None) if tile.batch is None else slice(*tile.batch)
        queries, keys = q[batch, tile.q_start : tile.q_stop], slice(tile.k_start, tile.k_stop)
        return self.block(queries, k[batch, keys], v[batch, keys], corner.lower, corner.upper, scale, softcap)

"""A few new tokens against a key/value cache that is spread over ranks.

Every rank has the same queries and its own cache rows. Each computes a partial over its rows, and the partials become one
result, the same on every rank (`tokenring.caching.combine`). This is pass-Q with nothing to pass: the cache never moves
(flash-decoding over ranks; Meta's pass-Q, arXiv 2411.01783).

It costs (Dv + 1) 4 bytes for each query, head and peer, or less in two rounds, whatever the cache holds. Moving the keys and
values of P cached tokens would be cheaper from about P Hkv / Hq new tokens on; so many are a chunk, which goes over the ranks
with `KVCache.deal` and `tokenring.attention`, where "auto" chooses what travels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenring import kernels
from tokenring.arguments import check_options, check_tensors
from tokenring.caching.combine import combine
from tokenring.kernels.base import BlockKernel
from tokenring.layout import Layout
from tokenring.mask import Mask
from tokenring.merge import accumulator_dtype, merge_
from tokenring.segments import Segment, Tile
from tokenring.transport import Transport, connect

if TYPE_CHECKING:
    from tokenring.topology import Topology

Work = tuple[slice, Tensor, Tensor, tuple[Tile, ...]]
"""Batch entries, their keys and values, and the tiles of all queries against these."""


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    group: Any = None,
    lengths: Tensor | None = None,
    positions: Tensor | None = None,
    kv_layout: Layout | Sequence[Layout] | None = None,
    mask: Mask | str = "causal",
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    topology: Topology | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens over the whole spread cache. Collective; no gradients flow.

    Say which rows the cache holds by `lengths` and `positions`, in any order, or by `kv_layout`, which is quicker where a
    mask needs the positions: nothing is asked of the other ranks and no row is copied.

    Args:
        q: (B, Sq, Hq, D), the same on every rank: the last Sq positions of each sequence, whose keys are in the cache already.
        k_cache: (B, S_cache, Hkv, D), v_cache: (B, S_cache, Hkv, Dv): this rank's rows; S_cache may differ per rank and be 0.
        group: ProcessGroup, 1-D DeviceMesh, LocalGroup, or None.
        lengths: int (B,), how many of this rank's rows are valid, counted from the front.
        positions: int (B, S_cache), their global positions, in any order.
        kv_layout: the cut of the whole cache over the ranks, or one for each batch entry: `KVCache.layouts`.
        mask: "causal", "full" (the new tokens see one another too) or a Mask: a window, spans, lengths, documents that reach
            to the newest token.
        scale, softcap, sinks: as in `tokenring.attention`.
        topology: the links, the same on every rank: how the partials travel is chosen by it, otherwise by bytes.
        return_lse: also return lse (B, Hq, Sq).

    Returns:
        out (B, Sq, Hq, Dv) in q's dtype, bitwise the same on every rank.

    >>> q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 6, 2, 8)
    >>> decode_attention(q, k, k, lengths=torch.tensor([5]), positions=torch.arange(6)[None]).shape
    torch.Size([1, 1, 4, 8])
    >>> decode_attention(q, k, k, kv_layout=Layout.contiguous(6, 1), mask=Mask.window(3)).shape
    torch.Size([1, 1, 4, 8])
    """
    runtime = connect(group)
    q, k_cache, v_cache = q.detach(), k_cache.detach(), v_cache.detach()
    check_tensors(q, k_cache, v_cache)
    check_options(q, sinks, scale, softcap)
    mask = _checked_mask(mask, q.shape[0])
    if kv_layout is not None:
        if lengths is not None or positions is not None:
            raise ValueError("got kv_layout beside lengths or positions, which say the same; leave one of them out")
        work = _by_layout(q, k_cache, v_cache, _checked_layouts(kv_layout, q, k_cache, runtime), mask, runtime.rank)
    else:
        _check_rows(k_cache, lengths, positions)
        work = _by_positions(q, k_cache, v_cache, lengths, positions, mask, runtime)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    out, lse = _partial(q, v_cache, work, scale, softcap)
    out, lse = combine(out, lse, runtime, dtype=q.dtype, sinks=sinks, return_lse=return_lse, topology=topology)
    return (out, lse) if return_lse else out


# -- what is refused ---------------------------------------------------------------------------------------------------


def _checked_mask(mask: Mask | str, batch: int) -> Mask:
    mask = Mask.of(mask)
    if mask.limits.packed:
        raise ValueError(
            "the mask's documents have key axes of their own (kv_cu_seqlens); a cache has one axis of positions: give "
            "Mask.documents(cu_seqlens) that reach to the newest token"
        )
    if mask.limits.batch not in (None, batch):
        raise ValueError(f"the mask has lengths for {mask.limits.batch} batch entries; the tensors have {batch}")
    return mask


def _check_newest(mask: Mask, newest: int) -> None:
    if mask.limits.q_stop is not None and newest >= mask.limits.q_stop:
        raise ValueError(
            f"the mask's documents end at position {mask.limits.q_stop}; the newest token is at {newest}: "
            "give documents that reach to it"
        )


def _check_rows(k_cache: Tensor, lengths: Tensor | None, positions: Tensor | None) -> None:
    batch, rows = k_cache.shape[:2]
    if lengths is None or positions is None:
        raise ValueError("give lengths and positions of this rank's cache rows, or kv_layout")
    if tuple(lengths.shape) != (batch,) or tuple(positions.shape) != (batch, rows):
        raise ValueError(
            f"lengths {tuple(lengths.shape)} and positions {tuple(positions.shape)} must be ({batch},) and ({batch}, {rows}) for this cache"
        )
    if lengths.is_floating_point() or positions.is_floating_point():
        raise ValueError(f"lengths are {lengths.dtype} and positions {positions.dtype}; both must be integers")
    if batch and (int(lengths.min()) < 0 or int(lengths.max()) > rows):
        raise ValueError(f"lengths {lengths.tolist()} must lie between 0 and the {rows} rows of the cache")


def _checked_layouts(
    given: Layout | Sequence[Layout], q: Tensor, k_cache: Tensor, runtime: Transport
) -> tuple[Layout, ...]:
    batch, rows = k_cache.shape[:2]
    layouts = (given,) * batch if isinstance(given, Layout) else tuple(given)
    if len(layouts) != batch or not all(isinstance(one, Layout) for one in layouts):
        raise ValueError(
            f"kv_layout is {given!r} for {batch} batch entries; give a tokenring.Layout, or one for each entry"
        )
    for one in set(layouts):
        if one.world != runtime.world or one.length(runtime.rank) > rows:
            there = one.length(runtime.rank) if runtime.rank < one.world else 0
            raise ValueError(
                f"kv_layout has {one.world} ranks and gives rank {runtime.rank} {there} rows; the group has "
                f"{runtime.world} ranks and this cache {rows} rows"
            )
        if one.total < q.shape[1]:
            raise ValueError(
                f"q has {q.shape[1]} queries and kv_layout {one.total} positions; the keys of new tokens must be in the "
                "cache before they are asked for"
            )
    return layouts


# -- which keys each query sees ----------------------------------------------------------------------------------------


def _by_layout(q: Tensor, k: Tensor, v: Tensor, layouts: tuple[Layout, ...], mask: Mask, rank: int) -> Iterator[Work]:
    for layout in set(layouts):
        _check_newest(mask, layout.offset + layout.total - 1)
    alike = [(one, entry if mask.limits.batch else None) for entry, one in enumerate(layouts)]
    first = 0
    for (layout, entry), run in groupby(alike):
        here = slice(first, first + len(list(run)))
        yield here, k[here], v[here], _tiles(mask, layout, rank, q.shape[1], entry)
        first = here.stop


@lru_cache(maxsize=256)
def _tiles(mask: Mask, layout: Layout, rank: int, queries: int, entry: int | None) -> tuple[Tile, ...]:
    newest = Segment(layout.offset + layout.total - queries, queries)
    tiles = mask.tiles([newest], layout.segments(rank))
    if entry is None:
        return tiles
    return tuple(replace(t, batch=None) for t in tiles if t.batch is None or t.batch[0] <= entry < t.batch[1])


def _by_positions(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, positions: Tensor, mask: Mask, runtime: Transport
) -> Iterator[Work]:
    rows, queries = lengths.tolist(), q.shape[1]
    if mask == Mask.full() or (mask == Mask.causal() and queries == 1):
        first = 0
        for length, run in groupby(rows):
            here = slice(first, first + len(list(run)))
            yield here, k[here], v[here], (Tile(0, queries, 0, length),)
            first = here.stop
        return
    newest = _query_positions(queries, lengths, positions, runtime)
    _check_newest(mask, int(newest.max()) if newest.numel() else -1)
    places = positions.cpu()
    for entry, length in enumerate(rows):
        allowed = mask.dense(newest[entry], places[entry, :length])
        allowed = allowed if allowed.dim() == 2 else allowed[entry]
        yield from _picked(allowed, slice(entry, entry + 1), k, v)


def _query_positions(queries: int, lengths: Tensor, positions: Tensor, runtime: Transport) -> Tensor:
    """(B, Sq) on the CPU: the last Sq positions of each sequence, from the largest position that any rank holds."""
    valid = torch.arange(positions.shape[1], device=positions.device)[None] < lengths[:, None].to(positions.device)
    columns = [
        positions.masked_fill(~valid, -1).to(torch.int64),
        torch.full((len(lengths), 1), -1, device=positions.device),
    ]
    newest = torch.cat(columns, dim=1).amax(dim=1).to(runtime.device)
    last = torch.stack(runtime.all_gather(newest, same_shape=True, control=True)).amax(dim=0).cpu()
    return last[:, None] - torch.arange(queries - 1, -1, -1)


def _picked(allowed: Tensor, here: slice, k: Tensor, v: Tensor) -> Iterator[Work]:
    """The keys that all queries see at once, then those that only some see, query by query."""
    queries = allowed.shape[0]
    common = allowed.all(dim=0)
    for first, last, seen in [(0, queries, common), *((i, i + 1, allowed[i] & ~common) for i in range(queries))]:
        rows = seen.nonzero().flatten()
        if not rows.numel():
            continue
        start, stop = int(rows[0]), int(rows[-1]) + 1
        if stop - start == rows.numel():
            yield here, k[here], v[here], (Tile(first, last, start, stop),)
            continue
        rows = rows.to(k.device)
        yield (
            here,
            k[here].index_select(1, rows),
            v[here].index_select(1, rows),
            (Tile(first, last, 0, rows.numel()),),
        )


# -- the partial over them ---------------------------------------------------------------------------------------------


def _partial(q: Tensor, v: Tensor, work: Iterator[Work], scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """(out, lse) over this rank's rows, in the accumulator dtype."""
    dtype = accumulator_dtype(q.dtype)
    shape = (*q.shape[:3], v.shape[3])
    kernel = kernels.choose("auto", q, v, softcap)
    total: tuple[Tensor, Tensor] | None = None
    for here, keys, values, tiles in work:
        for tile in tiles:
            rows = slice(tile.q_start, tile.q_stop)
            if rows.start == rows.stop or tile.k_start == tile.k_stop:
                continue
            part = _tile(kernel, q[here], keys, values, tile, scale, softcap)
            if total is None and part[0].shape == shape:
                total = part[0].to(dtype), part[1]
                continue
            total = total or _empty(shape, dtype, q.device)
            merge_(total[0][here, rows], total[1][here, :, rows], *part)
    return total or _empty(shape, dtype, q.device)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = shape
    lse = torch.full((batch, heads, rows), -torch.inf, dtype=dtype, device=device)
    return torch.zeros(shape, dtype=dtype, device=device), lse


def _tile(
    kernel: BlockKernel, q: Tensor, k: Tensor, v: Tensor, tile: Tile, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """One tile. Without a band the query heads of a key head are rows of one product, so that a key is read once for all."""
    rows, keys = (tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
    count, key_heads = tile.q_stop - tile.q_start, k.shape[2]
    each = q.shape[2] // key_heads
    if each == 1 or (tile.lower, tile.upper) != (None, None):
        return kernel.forward(q, k, v, (tile,), rows, scale, softcap)
    folded = q[:, slice(*rows)].unflatten(2, (key_heads, each)).transpose(2, 3).flatten(1, 2)
    whole = (Tile(0, count * each, 0, tile.k_stop - tile.k_start),)
    out, lse = kernel.forward(folded, k[:, keys], v[:, keys], whole, (0, count * each), scale, softcap)
    out = out.unflatten(1, (count, each)).transpose(2, 3).flatten(2, 3)
    return out, lse.unflatten(2, (count, each)).transpose(2, 3).flatten(1, 2)

"""One result on every rank from partials over the same queries: each rank saw other keys.

    lse = log sum_r exp(lse_r),   out = sum_r exp(lse_r - lse) out_r            in rank order, in float32 (float64 for float64)

Two ways for the partials, both with the same bits on every rank:

    gather     every partial to every rank, merged everywhere       one round     (N-1) U (Dv+1) 4 bytes a rank
    scatter    share r of the rows to rank r, merged there, and     two rounds    (N-1)/N U ((Dv+1) 4 + Dv e) bytes a rank
               the final rows of a share to every rank

U = batch entries x queries x heads, e the bytes of a number of the result. Fewest bytes against fewest rounds: `choose_way`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenring.merge import merge_, merge_sinks_
from tokenring.transport import Message, Transport

if TYPE_CHECKING:
    from tokenring.topology import Topology

WAYS = ("gather", "scatter")
ROUND_BYTES = 2**21
"""Where no topology is given: a round of messages takes as long as so many bytes through a rank, 5 microseconds at 420 GB/s.
On 4 gloo ranks over loopback, busy cores, the ways met where `scatter` saves 1.6 MB of them (measured)."""


def combine(
    out: Tensor,
    lse: Tensor,
    runtime: Transport,
    *,
    dtype: torch.dtype,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    way: str = "auto",
    topology: Topology | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The merged result of every rank's partial. Collective.

    Args:
        out: (B, S, Hq, Dv), lse: (B, Hq, S): this rank's partial, in the accumulator dtype.
        dtype: of the result.
        sinks: (Hq,), joined after the merge.
        return_lse: without it the way "scatter" need not send lse back.
        way: "gather", "scatter", or "auto" for the quicker one (`choose_way`), the same on every rank.
        topology: the links, for "auto".

    Returns:
        out (B, S, Hq, Dv) in `dtype`; lse (B, Hq, S), or None where it was not asked for.
    """
    if way not in ("auto", *WAYS):
        raise ValueError(f"way is {way!r}; give auto, {' or '.join(WAYS)}")
    batch, rows, heads, dims = out.shape
    packed = torch.cat([out, lse.transpose(1, 2).unsqueeze(-1)], dim=-1).view(-1, dims + 1)
    sizes = (dims, out.dtype.itemsize, dtype.itemsize, return_lse)
    every = None if sinks is None else sinks.repeat(batch * rows)
    if way == "auto":
        way = choose_way(runtime.world, len(packed), *sizes, topology)
    merged, merged_lse = _RUN[way](packed, runtime, dtype, every, return_lse)
    out = merged.view(batch, rows, heads, dims)
    return out, None if merged_lse is None else merged_lse.view(batch, rows, heads).transpose(1, 2).contiguous()


@lru_cache(maxsize=1024)
def choose_way(
    world: int,
    units: int,
    dims: int,
    wide: int,
    size: int,
    return_lse: bool,
    topology: Topology | None = None,
) -> str:
    """The quicker way: by the topology's seconds, without one by bytes with `ROUND_BYTES` for each round.

    Args:
        units: rows of the partial, queries x heads of all batch entries.
        dims: head dim of the values. wide, size: bytes of a number of the partial, and of the result.

    >>> choose_way(4, 32, 128, 4, 2, False), choose_way(4, 4096, 128, 4, 2, False)
    ('gather', 'scatter')
    """
    rounds = {way: _rounds(way, world, units, dims, wide, size, return_lse) for way in WAYS}
    if topology is None:
        cost = {way: sum(ROUND_BYTES + _busiest(sent) for sent in rounds[way]) for way in WAYS}
    else:
        cost = {way: sum(topology.seconds(sent) for sent in rounds[way]) for way in WAYS}
    return min(WAYS, key=lambda way: cost[way])


def bytes_sent(
    way: str, world: int, units: int, dims: int, wide: int, size: int, return_lse: bool = False
) -> dict[tuple[int, int], int]:
    """Payload bytes of a way by (source, destination); arguments as in `choose_way`.

    >>> bytes_sent("gather", 2, units=8, dims=4, wide=4, size=2)
    {(0, 1): 160, (1, 0): 160}
    """
    total: dict[tuple[int, int], int] = {}
    for sent in _rounds(way, world, units, dims, wide, size, return_lse):
        for source, destination, count in sent:
            total[(source, destination)] = total.get((source, destination), 0) + count
    return total


def _rounds(
    way: str, world: int, units: int, dims: int, wide: int, size: int, return_lse: bool
) -> list[list[tuple[int, int, int]]]:
    pairs = [(a, b) for a in range(world) for b in range(world) if a != b]
    partial, final = (dims + 1) * wide, dims * size + return_lse * wide
    if way == "gather":
        return [[(a, b, units * partial) for a, b in pairs]]
    share = [last - first for first, last in _cuts(units, world)]
    return [[(a, b, share[b] * partial) for a, b in pairs], [(a, b, share[a] * final) for a, b in pairs]]


def _busiest(sent: list[tuple[int, int, int]]) -> int:
    """Bytes through the rank that sends and receives the most."""
    through: dict[int, int] = {}
    for source, destination, count in sent:
        for rank in (source, destination):
            through[rank] = through.get(rank, 0) + count
    return max(through.values(), default=0)


def _cuts(units: int, world: int) -> list[tuple[int, int]]:
    return [(rank * units // world, (rank + 1) * units // world) for rank in range(world)]


def _gather(
    packed: Tensor, runtime: Transport, dtype: torch.dtype, sinks: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    parts = runtime.all_gather(packed, same_shape=True)
    out, lse = _merged(parts, sinks)
    return out.to(dtype), lse if return_lse else None


def _scatter(
    packed: Tensor, runtime: Transport, dtype: torch.dtype, sinks: Tensor | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    cuts, peers = _cuts(len(packed), runtime.world), [p for p in range(runtime.world) if p != runtime.rank]
    first, last = cuts[runtime.rank]
    parts = [packed.new_empty(last - first, packed.shape[1]) for _ in cuts]
    parts[runtime.rank] = packed[first:last]
    _exchange(runtime, [(p, packed[slice(*cuts[p])]) for p in peers], [(p, parts[p]) for p in peers])
    mine, my_lse = _merged(parts, None if sinks is None else sinks[first:last])
    out = torch.empty(len(packed), packed.shape[1] - 1, dtype=dtype, device=packed.device)
    lse = packed.new_empty(len(packed))
    out[first:last], lse[first:last] = mine.to(dtype), my_lse
    finals = (out, lse) if return_lse else (out,)
    sends = [(p, x[first:last]) for p in peers for x in finals]
    _exchange(runtime, sends, [(p, x[slice(*cuts[p])]) for p in peers for x in finals])
    return out, lse if return_lse else None


def _exchange(runtime: Transport, sends: list[Message], receives: list[Message]) -> None:
    """Without the empty messages of shares that have no rows."""
    runtime.exchange(*([(p, x) for p, x in messages if x.numel()] for messages in (sends, receives)))


def _merged(parts: list[Tensor], sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(units, Dv) and (units,) of packed partials, merged in rank order."""
    out, lse = parts[0][:, :-1].clone()[None, None], parts[0][:, -1].clone()[None, :, None]
    for part in parts[1:]:
        merge_(out, lse, part[:, :-1][None, None], part[:, -1][None, :, None])
    if sinks is not None:
        merge_sinks_(out, lse, sinks)
    return out[0, 0], lse[0, :, 0]


_RUN = {"gather": _gather, "scatter": _scatter}

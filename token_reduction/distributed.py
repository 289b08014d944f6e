"""Reduction of tokens that are spread over ranks: every rank keeps its part of what a single rank would keep.

    rank 0: frames 0..5          rank 1: frames 6..9              the union of the kept rows, their order and
       |  its rows                  |  its rows                   their scores equal the single-rank result bit
       v                            v                             for bit, for every world and partition
    kept rows + global_index     kept rows + global_index

What travels besides two small headers per rank (kinds; method, sizes):

    identity, uniform, random, pool    nothing
    evs                                previous-frame rows that live on another rank, one number per token
    divprune                           candidate rows: some for the first choice, a pool of at most 512 rows per round
    every other                        nothing for a frame (or item) that lies whole on one rank; one that is cut is put together
                                       on all ranks: its features, or its channels alone where a method looks at no features
    merges                             when applied, the rows that an anchor gathers from other ranks (`Reduction.borrow`)
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from token_reduction.budget import Budget
from token_reduction.reducer import Reducer
from token_reduction.reduction import Reduction
from token_reduction.tokens import TokenShard, VisualTokens, whole
from tokenring.transport import Transport, connect

_HEADER = (
    "method, budget or seed",
    "grid",
    "feature width",
    "feature dtype",
    "channels that the method uses where there are any",
)


def reduce_distributed(
    method: Reducer,
    tokens_local: VisualTokens | TokenShard,
    budget: Budget | None,
    group: Any = None,
    *,
    generator_seed: int | None = None,
) -> Reduction:
    """This rank's part of `method.reduce` over the tokens of all ranks. Collective: every rank of the group calls it.

    Args:
        method: built with the same options on every rank.
        tokens_local: what this rank holds, in one of two ways. A `TokenShard` says it exactly, for any partition, and may
            be empty. Plain `VisualTokens` are this rank's own frames: the frames of item i on rank 0, then those on rank
            1, and so on, make up item i; every rank gives the same items (T = 0 where it holds nothing of one), h and w.
        budget: of one whole item, not of one rank's share.
        group: ProcessGroup, 1-D DeviceMesh, LocalGroup, or None for one rank alone.
        generator_seed: seed of the generator for methods that draw; None leaves it to the method's own `seed`.

    Returns:
        A Reduction whose `index`, `apply`, `sizes` and `scores` speak of this rank's rows, and whose `global_index` holds
        the kept rows' numbers in the whole batch.

    Raises: ValueError on every rank where the ranks disagree on method, budget, grid or width, where their rows are not a
        partition of the batch, or where one rank's rows cannot be reduced (the rank is named).

    >>> from token_reduction import build
    >>> tokens = VisualTokens(torch.zeros(6, 4), [0, 6], [(3, 1, 2)], torch.arange(6)[None])
    >>> reduce_distributed(build("uniform"), tokens, Budget.count(2)).global_index
    tensor([1, 4])
    """
    transport = connect(group)
    _agree_on_kinds(method, tokens_local, transport)
    shard = tokens_local if isinstance(tokens_local, TokenShard) else _place(tokens_local, transport)
    counts, problem = _counts(method, shard, budget)
    wanted = sorted(method.wants & set(shard.channels))
    _agree(shard, (method, budget, generator_seed), wanted, problem, transport)
    generator = None if generator_seed is None else torch.Generator().manual_seed(generator_seed)
    return method.reduce_shard(shard, counts, transport, generator)


def _counts(method: Reducer, shard: TokenShard, budget: Budget | None) -> tuple[list[int], str | None]:
    """Counts per item, or why there are none: an error may not leave one rank before the others know of it."""
    try:
        counts = method.count(shard.grid, budget)
    except ValueError as error:
        return [], str(error)
    return counts, method.problem(shard, counts)


def _agree_on_kinds(method: Any, tokens: Any, transport: Transport) -> None:
    """Raise on every rank alike where one was given something else than a method and tokens, or another kind of tokens."""
    problem = None
    if not isinstance(method, Reducer):
        problem = f"method is {method!r}; give a method, such as build('divprune')"
    elif not isinstance(tokens, VisualTokens | TokenShard):
        problem = f"tokens_local is a VisualTokens or a TokenShard, got {type(tokens).__name__}"
    if transport.world > 1:
        plain = isinstance(tokens, VisualTokens)
        own = torch.tensor([problem is not None, len(tokens.grid) if plain else -1], dtype=torch.int64)
        own = own.to(tokens.x.device if problem is None else transport.device)
        bad, items = torch.stack(transport.all_gather(own, same_shape=True, control=True)).T.tolist()
        if problem is None and any(bad):
            problem = f"rank {bad.index(1)} was given no method or no tokens; its own error says which"
        elif problem is None and len(set(items)) > 1:
            said = ["a TokenShard" if number < 0 else f"VisualTokens of {number} items" for number in items]
            problem = f"ranks hold {', '.join(said)}; give one kind and every item on every rank, with 0 frames where a rank has none"
    if problem:
        raise ValueError(problem)


def _place(tokens: VisualTokens, transport: Transport) -> TokenShard:
    """Each item's frames of all ranks in rank order, and where this rank's frames come in that order."""
    if transport.world == 1:
        return whole(tokens)
    device = tokens.x.device
    grids = [part.tolist() for part in transport.all_gather(torch.tensor(tokens.grid, device=device))]
    shapes = [[(h, w) for _, h, w in grid] for grid in grids]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"ranks hold different items, with (height, width) {shapes}; give every item on every rank, with 0 frames where "
            "a rank has none of it, or use TokenShard"
        )
    grid, index, start = [], [], 0
    for item, (h, w) in enumerate(shapes[0]):
        frames = [own[item][0] for own in grids]
        first = start + sum(frames[: transport.rank]) * h * w
        index.append(torch.arange(first, first + frames[transport.rank] * h * w, device=device))
        grid.append((sum(frames), h, w))
        start += sum(frames) * h * w
    offsets = torch.tensor([0, *(t * h * w for t, h, w in grid)]).cumsum(0)
    return TokenShard(tokens.x, torch.cat(index), offsets, tuple(grid), tokens.positions, tokens.channels)


def _agree(
    shard: TokenShard, settings: tuple[Any, ...], wanted: list[str], problem: str | None, transport: Transport
) -> None:
    """Raise on every rank alike what would otherwise hang some of them or give a wrong union."""
    if transport.world > 1:
        device = shard.x.device
        fixed = [_crc(settings), _crc(shard.grid), shard.x.shape[1], _crc(shard.x.dtype), _crc(wanted)]
        own = torch.tensor([problem is not None, shard.x.shape[0], *fixed], device=device)
        own = torch.cat([own, _fingerprint(shard.global_index)[None]])
        headers = torch.stack(transport.all_gather(own[None]))[:, 0].cpu()
        _compare(shard, headers.tolist(), problem)
    elif shard.x.shape[0] != shard.total:
        raise ValueError(f"one rank alone must hold all {shard.total} rows, got {shard.x.shape[0]}; pass the group")
    if problem:
        raise ValueError(problem)


def _compare(shard: TokenShard, headers: Sequence[list[int]], problem: str | None) -> None:
    for place, what in enumerate(_HEADER, start=2):
        values = [header[place] for header in headers]
        if len(set(values)) > 1:
            odd = next(rank for rank, value in enumerate(values) if value != values[0])
            raise ValueError(
                f"ranks disagree on {what}: rank {odd} differs from rank 0; call with the same on every rank"
            )
    rows = [header[1] for header in headers]
    prints = torch.tensor([header[-1] for header in headers]).sum()
    if sum(rows) != shard.total or prints != _fingerprint(torch.arange(shard.total)):
        raise ValueError(
            f"the ranks hold {rows} rows, which are not each of the {shard.total} rows of the batch once; "
            "check global_index on every rank"
        )
    refused = [rank for rank, header in enumerate(headers) if header[0]]
    if refused and not problem:
        raise ValueError(f"rank {refused[0]} cannot reduce its rows; its own error says why")


def _crc(value: Any) -> int:
    return zlib.crc32(repr(value).encode())


def _fingerprint(index: Tensor) -> Tensor:
    """Sum of a mixed hash of each row number, modulo 2^64: equal for a partition and the whole, whatever the order."""
    mixed = index * -7046029254386353131
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return (mixed ^ (mixed >> 32)).sum()

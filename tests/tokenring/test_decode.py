"""Decoding against a spread cache equals dense attention over the whole of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenring as tr
from tests.oracle import dense_attention, random_qkv
from tests.pool import Pool

CAPACITY = 9


def spread(world: int, lengths: list[int], seed: int) -> list[list[list[int]]]:
    """For each rank and batch row, the positions it holds: dealt at random, unevenly, some ranks with none."""
    make = torch.Generator().manual_seed(seed)
    held: list[list[list[int]]] = [[[] for _ in lengths] for _ in range(world)]
    for row, length in enumerate(lengths):
        for position in torch.randperm(length, generator=make).tolist():
            rank = int(torch.randint(0, max(1, world - 1), (), generator=make))
            held[rank][row].append(position)
    return held


def decode(group: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, held: list, options: dict) -> tuple:
    mine = held[group.rank()] if group is not None else held[0]
    capacity = max(len(p) for p in mine) + group.rank() if group is not None else max(len(p) for p in mine)
    k_cache, v_cache = (torch.full((q.shape[0], capacity, *x.shape[2:]), torch.nan, dtype=x.dtype) for x in (k, v))
    positions = torch.full((q.shape[0], capacity), 10**6)
    for row, where in enumerate(mine):
        k_cache[row, : len(where)], v_cache[row, : len(where)] = k[row, where], v[row, where]
        positions[row, : len(where)] = torch.tensor(where, dtype=torch.int64)
    lengths = torch.tensor([len(p) for p in mine])
    return tr.decode_attention(
        q, k_cache, v_cache, group=group, lengths=lengths, positions=positions, return_lse=True, **options
    )


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("queries", [1, 3])
def test_spread_cache_equals_dense_attention(world: int, queries: int) -> None:
    lengths = [7, 12, 5]
    q, k, v = random_qkv(3, 12, 4, 2, 8, torch.float64, v_dim=6)
    q = q[:, :queries]
    sinks = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    for options in ({}, {"mask": "full"}, {"sinks": sinks, "scale": 0.3}):
        held = spread(world, lengths, seed=world)
        results = tr.run_local(world, decode, q, k, v, held, options)
        for row, length in enumerate(lengths):
            mask = tr.Mask.of(options.get("mask", "causal"))
            allowed = mask.dense(torch.arange(length - queries, length), torch.arange(length))
            one = (x[row : row + 1] for x in (q, k[:, :length], v[:, :length]))
            want = dense_attention(*one, allowed, sinks=options.get("sinks"), scale=options.get("scale"))
            torch.testing.assert_close(results[0][0][row : row + 1], want[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(results[0][1][row : row + 1], want[1], rtol=0, atol=1e-12)
        assert all(torch.equal(results[0][0], out) and torch.equal(results[0][1], lse) for out, lse in results)


def test_processes_end_with_the_same_bits(pool: Pool) -> None:
    q, k, v = random_qkv(1, 20, 9, 3, 16, torch.float32)
    held = spread(4, [20], seed=1)
    results = pool.run(4, decode, q[:, :1], k, v, held, {})
    want, _ = dense_attention(q[:, :1], k, v, torch.ones(1, 20, dtype=torch.bool))
    torch.testing.assert_close(results[0][0].double(), want, rtol=0, atol=1e-5)
    assert all(torch.equal(results[0][0], out) for out, _ in results)


def test_an_empty_cache_gives_zeros() -> None:
    q, k, _ = random_qkv(1, 1, 2, 1, 8, torch.float32)
    out, lse = tr.decode_attention(
        q,
        k[:, :0],
        k[:, :0],
        lengths=torch.tensor([0]),
        positions=torch.empty(1, 0, dtype=torch.int64),
        return_lse=True,
    )
    assert (out == 0).all() and torch.isneginf(lse).all()


def test_wrong_caches_are_refused() -> None:
    q, k, v = random_qkv(1, 4, 4, 2, 8, torch.float32)
    good = {"lengths": torch.tensor([4]), "positions": torch.arange(4)[None]}
    with pytest.raises(ValueError, match="must lie between 0 and the 4 rows"):
        tr.decode_attention(q, k, v, **(good | {"lengths": torch.tensor([5])}))
    with pytest.raises(ValueError, match=r"must be \(1,\) and \(1, 4\)"):
        tr.decode_attention(q, k, v, **(good | {"positions": torch.arange(3)[None]}))
    with pytest.raises(ValueError, match="query heads must be a multiple"):
        tr.decode_attention(q[:, :, :3], k, v, **good)
    with pytest.raises(ValueError, match='decoding takes "causal" or "full"'):
        tr.decode_attention(q, k, v, mask="window", **good)
    with pytest.raises(ValueError, match="k and v must be alike"):
        tr.decode_attention(q, k[:, :3], v, **good)
    with pytest.raises(ValueError, match="one logit for each of the 4 query heads"):
        tr.decode_attention(q, k, v, sinks=torch.zeros(1), **good)
    with pytest.raises(ValueError, match=r"softcap is 0\.0"):
        tr.decode_attention(q, k, v, softcap=0.0, **good)
    with pytest.raises(ValueError, match="give one floating dtype"):
        tr.decode_attention(q.double(), k, v, **good)
    with pytest.raises(ValueError, match="both must be integers"):
        tr.decode_attention(q, k, v, **(good | {"lengths": torch.tensor([4.0])}))


def test_no_queries_give_no_rows() -> None:
    q, k, v = random_qkv(1, 4, 4, 2, 8, torch.float32)
    for mask in ("causal", "full"):
        out = tr.decode_attention(q[:, :0], k, v, lengths=torch.tensor([4]), positions=torch.arange(4)[None], mask=mask)
        assert out.shape == (1, 0, 4, 8)

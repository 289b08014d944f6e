"""Decoding against a spread cache equals dense attention over the whole of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenring as tr
from tests.oracle import dense_attention, random_qkv
from tests.pool import Pool
from tokenring.caching.combine import bytes_sent
from tokenring.caching.dealing import deal, joined

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
    with pytest.raises(ValueError, match="mask is 'window'"):
        tr.decode_attention(q, k, v, mask="window", **good)
    with pytest.raises(ValueError, match="documents end at position 3; the newest token is at 3"):
        tr.decode_attention(q[:, :2], k, v, mask=tr.Mask.documents([0, 3]), **good)
    with pytest.raises(ValueError, match="key axes of their own"):
        tr.decode_attention(q[:, :2], k, v, mask=tr.Mask.documents([0, 2], [0, 4]), **good)
    with pytest.raises(ValueError, match="lengths for 2 batch entries; the tensors have 1"):
        tr.decode_attention(q[:, :2], k, v, mask=tr.Mask.lengths([1, 2]), **good)
    with pytest.raises(ValueError, match="give lengths and positions of this rank's cache rows, or kv_layout"):
        tr.decode_attention(q, k, v, lengths=good["lengths"])
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


def test_wrong_layouts_are_refused() -> None:
    q, k, v = random_qkv(1, 4, 4, 2, 8, torch.float32)
    four = tr.Layout.contiguous(4, 1)
    with pytest.raises(ValueError, match="leave one of them out"):
        tr.decode_attention(q, k, v, kv_layout=four, lengths=torch.tensor([4]))
    with pytest.raises(ValueError, match="gives rank 0 5 rows"):
        tr.decode_attention(q, k, v, kv_layout=tr.Layout.contiguous(5, 1))
    with pytest.raises(ValueError, match="kv_layout has 2 ranks"):
        tr.decode_attention(q, k, v, kv_layout=tr.Layout.contiguous(8, 2))
    with pytest.raises(ValueError, match="q has 4 queries and kv_layout 3 positions"):
        tr.decode_attention(q, k, v, kv_layout=tr.Layout.contiguous(3, 1))
    with pytest.raises(ValueError, match=r"for 1 batch entries; give a tokenring\.Layout, or one for each"):
        tr.decode_attention(q, k, v, kv_layout=[four, four])


NEWEST = 4
MASKS = {
    "window": tr.Mask.window(5),
    "narrow window": tr.Mask.window(1),
    "both-sided window": tr.Mask.window(3, 2),
    "documents": tr.Mask.documents([0, 9, 18, 30]),
    "spans": tr.Mask.spans([(2, 7), (17, 19)]),
    "lengths": tr.Mask.lengths([19, 13]) & tr.Mask.causal(),
    "documents & window": tr.Mask.documents([0, 9, 18, 30], causal=False) & tr.Mask.window(4, 1),
}


def decode_masked(group: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: tr.Mask, world: int) -> tuple:
    """The same cache told by positions in any order, and by a layout of chunks that were dealt."""
    layout = tr.Layout.contiguous(0, world)
    for count in (11, 1, 1, 6):
        chunk = deal([layout.length(r) for r in range(world)], count, offset=layout.total)
        layout = joined(layout, chunk)
    rank = group.rank() if group is not None else 0
    by_layout = tr.decode_attention(
        q, layout.shard(k, rank), layout.shard(v, rank), group=group, kv_layout=layout, mask=mask, return_lse=True
    )
    held = spread(world, [19, 19], seed=world)
    return by_layout, decode(group, q, k, v, held, {"mask": mask})


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("queries", [1, NEWEST])
def test_masks_of_every_kind_equal_dense_attention(world: int, kind: str, queries: int) -> None:
    q, k, v = random_qkv(2, 19, 6, 2, 8, torch.float64)
    q, mask = q[:, :queries], MASKS[kind]
    allowed = mask.dense(torch.arange(19 - queries, 19), torch.arange(19))
    allowed = allowed if allowed.dim() == 3 else allowed.expand(2, -1, -1)
    for results in tr.run_local(world, decode_masked, q, k, v, mask, world):
        for out, lse in results:
            for entry in range(2):
                one = (x[entry : entry + 1] for x in (q, k, v))
                want = dense_attention(*one, allowed[entry])
                torch.testing.assert_close(out[entry : entry + 1], want[0], rtol=0, atol=1e-12)
                torch.testing.assert_close(lse[entry : entry + 1], want[1], rtol=0, atol=1e-12)


def test_a_layout_needs_no_message_but_the_partials() -> None:
    q, k, v = random_qkv(1, 18, 4, 2, 8, torch.float32)
    layout = tr.Layout.zigzag(18, 3)

    def work(group: Any) -> tuple[dict, dict]:
        rows = [layout.shard(x, group.rank()) for x in (k, v)]
        with tr.count_traffic(group) as traffic:
            tr.decode_attention(q[:, :2], *rows, group=group, kv_layout=layout, mask=tr.Mask.window(3))
        return traffic.sent, traffic.control

    for rank, (sent, control) in enumerate(tr.run_local(3, work)):
        assert sent == {(rank, peer): 2 * 4 * (8 + 1) * 4 for peer in range(3) if peer != rank}
        assert control == {}


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("queries", [1, 3])
def test_grouped_heads_softcap_and_sinks(heads: tuple[int, int], queries: int) -> None:
    q, k, v = random_qkv(2, 14, *heads, 8, torch.float64)
    layout, sinks = tr.Layout.zigzag(14, 3), torch.linspace(-1, 1, heads[0], dtype=torch.float64)
    for options in ({}, {"sinks": sinks}, {"softcap": 2.0, "sinks": sinks}):
        allowed = tr.Mask.causal().dense(torch.arange(14 - queries, 14), torch.arange(14))
        want, _ = dense_attention(q[:, :queries], k, v, allowed, **options)

        def work(group: Any, options: dict = options) -> torch.Tensor:
            rows = (layout.shard(x, group.rank()) for x in (k, v))
            return tr.decode_attention(q[:, :queries], *rows, group=group, kv_layout=layout, **options)

        for out in tr.run_local(3, work):
            torch.testing.assert_close(out, want, rtol=0, atol=1e-12)


def test_many_queries_take_the_way_of_two_rounds_and_end_with_the_same_bits(pool: Pool) -> None:
    q, k, v = random_qkv(1, 400, 16, 4, 32, torch.float32)
    layout = tr.Layout.zigzag(400, 4)
    results = pool.run(4, _counted, q[:, :380], k, v, layout)
    want, _ = dense_attention(q[:, :380], k, v, tr.Mask.causal().dense(torch.arange(20, 400), torch.arange(400)))
    for rank, (out, sent) in enumerate(results):
        torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)
        assert torch.equal(out, results[0][0])
        assert sent == {p: n for p, n in bytes_sent("scatter", 4, 380 * 16, 32, 4, 4).items() if p[0] == rank}


def _counted(group: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: tr.Layout) -> tuple:
    rows = (layout.shard(x, group.rank()) for x in (k, v))
    with tr.count_traffic(group) as traffic:
        out = tr.decode_attention(q, *rows, group=group, kv_layout=layout)
    return out, traffic.sent


def test_no_queries_give_no_rows() -> None:
    q, k, v = random_qkv(1, 4, 4, 2, 8, torch.float32)
    for mask in ("causal", "full"):
        out = tr.decode_attention(q[:, :0], k, v, lengths=torch.tensor([4]), positions=torch.arange(4)[None], mask=mask)
        assert out.shape == (1, 0, 4, 8)

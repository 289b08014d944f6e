"""Every rank's part together equals the single-rank result, bit for bit."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from tests.token_reduction.cases import METHODS, batch, cut_anywhere, cut_frames
from token_reduction import Budget, VisualTokens, build, methods, reduce_distributed
from token_reduction.tokens import take_channels
from tokenring import count_traffic, run_local

OPTIONS = [(name, {}) for name in METHODS] + [
    ("identity", {}),
    ("divprune", {"center": True}),
    ("divprune", {"variant": "released"}),
    ("evs", {"center": True}),
]


def reduce_all(method, shards, budget, **options):
    world = len(shards)
    return run_local(world, lambda g: reduce_distributed(method, shards[g.rank()], budget, g, **options))


def reduce_and_apply(method, shards, budget, **options):
    """Each rank's reduction and its reduced features; a merge may draw on other ranks, so all apply together."""

    def work(group):
        shard = shards[group.rank()]
        reduction = reduce_distributed(method, shard, budget, group, **options)
        return reduction, reduction.apply(shard.x)

    return zip(*run_local(len(shards), work), strict=True)


def same_as_single(tokens, method, budget, shards, **options):
    """Union over ranks against one rank: rows, items, scores, sizes, features and positions."""
    generator = torch.Generator().manual_seed(options["generator_seed"]) if options else None
    single = method.reduce(tokens, budget, generator)
    parts, applied = reduce_and_apply(method, shards, budget, **options)
    everywhere = torch.cat([part.global_index for part in parts])
    order = everywhere.sort(stable=True).indices
    assert everywhere[order].tolist() == single.index.tolist()
    assert sum(part.cu_seqlens for part in parts).tolist() == single.cu_seqlens.tolist()
    assert torch.cat([part.sizes for part in parts])[order].tolist() == single.sizes.tolist()
    features = torch.cat(applied)
    assert bool((features[order] == single.apply(tokens.x)).all())
    positions = torch.cat([p.apply_positions(s.positions) for p, s in zip(parts, shards, strict=True)], 1)
    assert bool((positions[:, order] == single.apply_positions(tokens.positions)).all())
    for part, shard in zip(parts, shards, strict=True):
        assert shard.global_index[part.index].tolist() == part.global_index.tolist()
        if single.scores is not None:
            assert part.scores.tolist() == single.scores[shard.global_index].tolist()


@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_whole_frames_on_any_world_equal_one_rank(name, options, world):
    tokens, method = batch(), build(name, **options)
    budget = Budget.ratio(1.0 if name == "identity" else 0.3)
    same_as_single(tokens, method, budget, cut_frames(tokens, world))
    same_as_single(tokens, method, budget, cut_frames(tokens, world, uneven=True))


@pytest.mark.parametrize("world", [2, 5])
@pytest.mark.parametrize(("name", "options"), [pair for pair in OPTIONS if pair[0] != "pool"])
def test_any_partition_of_the_rows_equals_one_rank(name, options, world):
    tokens, method = batch(dtype=torch.bfloat16), build(name, **options)
    budget = Budget.ratio(1.0) if name == "identity" else Budget.count(11)
    same_as_single(tokens, method, budget, cut_anywhere(tokens, world))


def test_near_ties_and_duplicates_fall_the_same_way_everywhere():
    """Tokens that differ in the last bits of float32: any rounding that depended on the shard would show."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 48, generator=generator).repeat(6, 1)
    x = base * (1 + 1e-7 * torch.randint(-2, 3, base.shape, generator=generator))
    tokens = VisualTokens(x, [0, 240], [(6, 5, 8)], torch.arange(240)[None])
    for world in (2, 3, 4):
        for name in ("divprune", "evs"):
            same_as_single(tokens, build(name), Budget.count(100), cut_anywhere(tokens, world))


def test_fewer_rows_than_ranks_do_not_hang():
    tokens = batch(((1, 1, 2), (1, 1, 1)))
    for name in METHODS:
        same_as_single(tokens, build(name), Budget.count(1), cut_frames(tokens, 5))


def test_random_follows_one_seed_on_all_ranks():
    tokens = batch()
    for seed in (1, 2):
        same_as_single(tokens, build("random"), Budget.ratio(0.3), cut_frames(tokens, 3), generator_seed=seed)


def test_plain_tokens_are_each_ranks_own_frames():
    tokens = batch()
    frames = [(2, 1, 0), (0, 0, 3), (3, 0, 0)]
    shards, at = [], [0, 0, 0]
    for own in frames:
        rows, grid, offsets = [], [], [0]
        for item, count in enumerate(own):
            _, h, w = tokens.grid[item]
            first = int(tokens.cu_seqlens[item]) + at[item] * h * w
            rows.append(torch.arange(first, first + count * h * w))
            at[item] += count
            grid.append((count, h, w))
            offsets.append(offsets[-1] + count * h * w)
        index = torch.cat(rows)
        channels = take_channels(tokens.channels, index)
        shards.append(VisualTokens(tokens.x[index], offsets, grid, tokens.positions[:, index], channels))
    for name in METHODS:
        budget = Budget.ratio(0.3)
        parts = reduce_all(build(name), shards, budget)
        single = build(name).reduce(tokens, budget)
        assert torch.cat([part.global_index for part in parts]).sort().values.tolist() == single.index.tolist()


def test_index_only_methods_send_a_header_and_divprune_no_whole_features():
    tokens = batch(((8, 16, 16),), width=64)
    shards, limit = cut_frames(tokens, 2), 8 * 10
    feature_bytes = shards[0].x.numel() * 4

    def sent(group, name):
        with count_traffic(group) as traffic:
            reduce_distributed(build(name), shards[group.rank()], Budget.ratio(0.1), group)
        return sum(traffic.sent.values())

    for name in ("uniform", "random", "pool"):
        assert max(run_local(2, sent, name)) <= limit
    one_frame, scores = 256 * 64 * 4, 1024 * 16
    assert max(run_local(2, sent, "evs")) <= one_frame + scores + 256 * 16 + limit
    assert feature_bytes > one_frame + scores


def refusals(world, work):
    """What each rank's call raised."""

    def guarded(group):
        try:
            work(group)
        except ValueError as error:
            return str(error)
        return None

    return run_local(world, guarded)


def test_every_rank_refuses_a_union_that_is_no_partition():
    tokens = batch()
    shards = cut_frames(tokens, 3)
    shards[2] = shards[1]
    budget = Budget.ratio(1.0)
    for name in methods():
        for text in refusals(3, lambda g, n=name: reduce_distributed(build(n), shards[g.rank()], budget, g)):
            assert "not each of the 131 rows of the batch once" in text


def test_rows_held_twice_while_others_are_missing_are_noticed():
    """{0,3,5,6} twice has the count, the sum and the sum of squares of 0..7."""
    tokens = batch(((1, 2, 4),))
    shard = tokens.shard(torch.tensor([0, 3, 5, 6]))
    for text in refusals(2, lambda g: reduce_distributed(build("uniform"), shard, Budget.count(2), g)):
        assert "not each of the 8 rows" in text


def test_every_rank_refuses_when_one_calls_with_something_else():
    shards = cut_frames(batch(), 3)
    budgets = [Budget.count(4), Budget.count(4), Budget.count(5)]
    texts = refusals(3, lambda g: reduce_distributed(build("evs"), shards[g.rank()], budgets[g.rank()], g))
    assert all("disagree on method, budget or seed: rank 2 differs" in text for text in texts)
    wide = [*shards[:2], cut_frames(batch(width=13), 3)[2]]
    texts = refusals(3, lambda g: reduce_distributed(build("evs"), wide[g.rank()], budgets[0], g))
    assert all("disagree on feature width" in text for text in texts)


def test_an_error_on_one_rank_ends_every_rank():
    shards = cut_frames(batch(), 3)
    shards[1].x[0, 0] = float("inf")
    texts = refusals(3, lambda g: reduce_distributed(build("divprune"), shards[g.rank()], Budget.count(4), g))
    assert "NaN or infinity" in texts[1]
    assert all("rank 1 cannot reduce its rows" in texts[rank] for rank in (0, 2))


def test_pool_refuses_frames_that_are_cut_inside_a_cell():
    tokens = batch()
    shards = cut_anywhere(tokens, 2)
    texts = refusals(2, lambda g: reduce_distributed(build("pool"), shards[g.rank()], Budget.ratio(0.3), g))
    assert all("lies on several ranks" in text and "give each rank whole frames" in text for text in texts)


def test_one_rank_alone_must_hold_everything():
    with pytest.raises(ValueError, match="must hold all 131 rows, got 20; pass the group"):
        reduce_distributed(build("uniform"), batch().shard(torch.arange(20)), Budget.count(2))
    with pytest.raises(ValueError, match="VisualTokens or a TokenShard, got Tensor"):
        reduce_distributed(build("uniform"), torch.zeros(3), Budget.count(2))


def over_processes(group, name):
    tokens = batch()
    shard = cut_frames(tokens, group.size())[group.rank()]
    return reduce_distributed(build(name), shard, Budget.ratio(0.3), group).global_index.tolist()


@pytest.mark.parametrize("name", METHODS)
def test_processes_over_gloo_equal_one_rank(pool, name):
    parts = pool.run(3, over_processes, name)
    assert list(chain(*parts)) == build(name).reduce(batch(), Budget.ratio(0.3)).index.tolist()


@pytest.mark.parametrize(
    ("odd", "own", "others"),
    [
        (lambda tokens: (build("uniform"), "x"), "got str", "rank 1 was given no method or no tokens"),
        (lambda tokens: ("uniform", tokens), "give a method", "rank 1 was given no method or no tokens"),
        (lambda tokens: (build("uniform"), tokens.shard(torch.arange(3))), "give one kind", "a TokenShard"),
        (lambda tokens: (build("uniform"), batch(((1, 1, 3),) * 2)), "VisualTokens of 2 items", "give one kind"),
    ],
    ids=["no tokens", "no method", "a shard", "items"],
)
def test_a_rank_that_gives_another_kind_makes_all_raise_and_none_wait(odd, own, others):
    tokens = batch(((1, 1, 3),))

    def rank(group):
        method, mine = odd(tokens) if group.rank() == 1 else (build("uniform"), tokens)
        with pytest.raises(ValueError, match=own if group.rank() == 1 else others):
            reduce_distributed(method, mine, Budget.count(2), group)

    run_local(3, rank)

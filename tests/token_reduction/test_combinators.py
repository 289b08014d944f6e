"""Combinations of methods: by segments, one after another, in two levels."""

from __future__ import annotations

import pytest
import torch

from tests.token_reduction.cases import batch, cut_anywhere, cut_frames, one
from tests.token_reduction.test_distributed import refusals, same_as_single
from token_reduction import Budget, Segments, Then, build, methods, reduce_distributed, two_level
from token_reduction.tokens import VisualTokens, take_channels

FLAT = [name for name in methods() if build(name).flat]


def rows_of(tokens: VisualTokens, rows: torch.Tensor, grid) -> VisualTokens:
    """Some rows as an item of their own."""
    channels = take_channels(tokens.channels, rows)
    return VisualTokens(tokens.x[rows], [0, len(rows)], [grid], tokens.positions[:, rows], channels)


def test_segments_equal_the_method_on_every_run():
    tokens = batch(((5, 4, 4),))
    for name in ("divprune", "mmtok", "visionzip", "evs"):
        got = Segments(method=build(name), frames=2).reduce(tokens, Budget.count(17))
        expected = []
        for first, frames, share in ((0, 2, 7), (2, 2, 7), (4, 1, 3)):  # 17 over 32, 32, 16 tokens
            rows = torch.arange(first * 16, (first + frames) * 16)
            part = build(name).reduce(rows_of(tokens, rows, (frames, 4, 4)), Budget.count(share))
            expected += rows[part.index].tolist()
        assert got.index.tolist() == expected
        assert got.cu_seqlens.tolist() == [0, 17]


@pytest.mark.parametrize("name", FLAT)
def test_two_levels_are_the_method_on_the_offers_of_its_segments(name):
    tokens, method = batch(((4, 4, 4),)), build(name)
    got = two_level(method, frames=2, widen=1.5).reduce(tokens, Budget.count(10))
    offers = Segments(method=method, frames=2).reduce(tokens, Budget.count(15))
    among = rows_of(tokens, offers.index, (1, 1, 15))
    assert got.index.tolist() == offers.index[method.reduce(among, Budget.count(10)).index].tolist()
    assert torch.equal(got.apply(tokens.x), tokens.x[got.index])


@pytest.mark.parametrize("name", FLAT)
def test_two_levels_keep_the_same_tokens_on_every_world(name):
    tokens, method = batch(), two_level(build(name), frames=2)
    for shards in (cut_frames(tokens, 3), cut_frames(tokens, 4, uneven=True), cut_anywhere(tokens, 2)):
        same_as_single(tokens, method, Budget.ratio(0.3), shards)


def test_a_merge_may_come_first_on_one_rank():
    tokens = batch(((4, 4, 4),))
    method = Then(first=build("tome"), second=build("divprune"), widen=3)
    one_, two = build("tome").reduce(tokens, Budget.count(24)), method.reduce(tokens, Budget.count(8))
    chosen = build("divprune").reduce(one(one_.apply(tokens.x)), Budget.count(8))
    assert two.index.tolist() == one_.index[chosen.index].tolist()
    torch.testing.assert_close(two.dense(), one_.dense()[chosen.index])
    assert int(two.sizes.sum()) == int(one_.sizes[chosen.index].sum())
    shards = cut_frames(tokens, 2)
    texts = refusals(2, lambda g: reduce_distributed(method, shards[g.rank()], Budget.count(8), g))
    assert all("merges, which comes first on one rank only" in text for text in texts)


def test_only_offers_travel():
    """Two ranks with two whole segments each: what is sent does not grow with the features that are not offered."""
    from tokenring import count_traffic, run_local

    tokens = batch(((8, 16, 16),), width=64)
    shards = cut_frames(tokens, 2)

    def sent(group):
        with count_traffic(group) as traffic:
            reduce_distributed(
                two_level(build("facility"), frames=2, widen=2), shards[group.rank()], Budget.count(40), group
            )
        return sum(traffic.sent.values())

    offers = 40 * 64 * 4  # each rank's half of 2 x 40 rows, float32
    assert offers <= max(run_local(2, sent)) < 1.5 * offers + 2000
    assert shards[0].x.numel() * 4 > 20 * offers


def test_combinations_that_cannot_be_are_refused():
    for make, message in (
        (lambda: Segments(method=build("uniform"), frames=0), "frames=0; give a whole number of 1 or more"),
        (lambda: Segments(method="uniform"), "give a method, such as build"),
        (lambda: Then(first=build("divprune"), second=build("evs")), "evs looks at frames or places"),
        (lambda: Then(first=build("setok", variant="paper"), second=build("divprune")), "must keep exact counts"),
        (lambda: two_level(build("divprune"), widen=0.5), "widen=0.5; give a finite number of 1 or more"),
        (lambda: Segments(method=build("pool"), frames=2).count([(4, 3, 3)], Budget.count(10)), "pool does not keep 5"),
        (lambda: two_level(build("mmtok")).reduce(one(torch.ones(16, 2)), Budget.count(3)), "lack text"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_what_is_refused_at_once_is_done_in_two_levels():
    hour, count, width = (3600, 16, 16), 92_160, 384
    assert build("facility").work(hour, count, width) > 2e13 > two_level(build("facility")).work(hour, count, width)

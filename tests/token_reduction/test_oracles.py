"""Selecting methods against the same methods written as plain loops (`naive`), on data of their own."""

from __future__ import annotations

import pytest
import torch

from tests.token_reduction import naive
from tests.token_reduction.cases import one
from tests.token_reduction.oracle_cases import SEEDS, H, N, W, data, kept
from token_reduction import Budget, build
from token_reduction.exact import unit_rows
from token_reduction.selectors.cover import Cover, cosines
from token_reduction.selectors.coverage import greedy
from token_reduction.selectors.diversity import dpp_of


@SEEDS
def test_todre_in_both_published_forms(seed, count):
    x, channels, tokens = data(seed=seed)
    pivot = int(channels["cls_attn"].argmax())
    assert kept("todre", tokens, count) == naive.max_min(x, count, pivot)
    assert kept("todre", tokens, count, variant="paper") == naive.max_sum(x, count, pivot)
    assert kept("todre", tokens, count, diversity="max-sum") == naive.max_sum(x, count, pivot)


def test_todre_looks_for_its_pivot_in_the_thumbnail_when_told():
    _x, channels, tokens = data(frames=2, seed=5)
    assert kept("todre", tokens, 1, thumbnail=True) == [int(channels["cls_attn"][:N].argmax())]
    assert kept("todre", tokens, 1) == [int(channels["cls_attn"].argmax())]


@SEEDS
def test_facility_mmtok_and_catp_equal_greedy_from_scratch(seed, count):
    x, channels, tokens = data(seed=seed)
    assert kept("facility", tokens, count) == naive.coverage(naive.table(x, x), count, [0.0] * N, -1.0)
    text = channels["text"]
    assert kept("mmtok", tokens, count) == naive.mmtok(x, channels["patches"], text, count, 0.5, 0.2, 0.02)
    assert kept("mmtok", tokens, count, variant="released") == naive.mmtok(
        x, channels["patches"], text, count, 0.5, 0.2, 0.01
    )
    assert kept("catp", tokens, count) == naive.catp(x, text, count, 0.7)


def test_stochastic_facility_comes_near_the_exact_one_and_follows_its_seed():
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    tokens, q = one(x), torch.nn.functional.normalize(x.double(), dim=1)

    def value(index):
        return float((q @ q[index].T).amax(1).mean())

    exact = build("facility").reduce(tokens, Budget.count(30)).index
    draw = build("facility", sampler="stochastic")
    drawn = [draw.reduce(tokens, Budget.count(30), torch.Generator().manual_seed(s)).index for s in (1, 1, 2)]
    assert drawn[0].tolist() == drawn[1].tolist() != drawn[2].tolist()
    random = torch.randperm(300, generator=torch.Generator().manual_seed(3))[:30]
    assert value(random) < value(drawn[0]) <= value(exact)
    assert value(drawn[0]) > 0.9 * value(exact)


@pytest.mark.parametrize(("seed", "count"), [(0, 5), (1, 8)])
def test_cdpruner_equals_the_largest_determinants(seed, count):
    x, channels, tokens = data(seed=seed)
    assert kept("cdpruner", tokens, count) == naive.cdpruner(x, channels["patches"], channels["text"], count)
    kernel = torch.tensor(naive.table(x, x)).double().fill_diagonal_(1.0)
    assert kept("cdpruner", tokens, count, relevance=False) == sorted(naive.dpp(kernel, count))


def test_dpp_of_a_published_kernel():
    kernel = torch.tensor([[0.8, 0.3, 0.1, 0.2], [0.3, 0.9, 0.4, 0.1], [0.1, 0.4, 0.7, 0.5], [0.2, 0.1, 0.5, 0.6]])
    kernel = kernel.double()
    for count, order in ((1, [1]), (3, [1, 0, 3])):
        assert (
            dpp_of(lambda i, left: kernel[i], kernel.diagonal()[None], count, 4).tolist()[0]
            == order
            == naive.dpp(kernel, count)
        )


def test_a_dpp_beyond_its_rank_begins_a_new_set_instead_of_repeating():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    tokens = one(x)
    assert len(set(kept("cdpruner", tokens, 40, relevance=False))) == 40
    assert kept("cdpruner", tokens, 12, relevance=False, block=3) != kept("cdpruner", tokens, 12, relevance=False)


@SEEDS
def test_dart_spreads_over_its_pivots(seed, count):
    x, channels, tokens = data(seed=seed)
    assert kept("dart", tokens, count) == naive.dart(x, count, 8)
    assert kept("dart", tokens, count, keys=True) == naive.dart(channels["keys"], count, 8)
    with_text = kept("dart", tokens, count, variant="paper")
    assert len(with_text) == count


def test_darts_text_pivots_choose_what_is_least_like_them():
    x = torch.eye(6) + 0.01 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    x[5] *= 9.0  # the one pivot among the tokens
    text = -torch.eye(6)[3:4] + 0.0
    tokens = one(x, text=text)
    assert kept("dart", tokens, 2, pivots=1, text_pivots=1)[-1] == 5
    # two choices are shared 1 : 1 between the pivot's direction and the text's, which is farthest from token 3
    assert 3 in kept("dart", tokens, 3, pivots=1, text_pivots=1)


@SEEDS
def test_attention_methods(seed, count):
    x, channels, tokens = data(seed=seed)
    attention, (middle, deep) = channels["cls_attn"], channels["recv_attn"].unbind(1)
    assert kept("vtc_cls", tokens, count) == sorted(naive.best(attention, count))
    for variant, wrap in (("best", False), ("released", True)):
        for alpha in (0.1, 1.0):
            expected = naive.hiprune(middle, deep, H, W, count, alpha, wrap)
            assert kept("hiprune", tokens, count, alpha=alpha, variant=variant) == expected
    assert kept("vispruner", tokens, count) == naive.vispruner(x, attention, count, 0.5, 8)
    assert kept("vispruner", tokens, count, important=0.25, per_round=2) == naive.vispruner(
        x, attention, count, 0.25, 2
    )


def test_vtc_cls_sums_its_layers():
    layers = torch.tensor([[0.5, 0.0], [0.3, 0.3], [0.0, 0.5], [0.1, 0.1]])
    assert kept("vtc_cls", one(torch.randn(4, 2), cls_attn=layers), 1) == [1]


def test_image_text_cuts_at_the_knee():
    attention = torch.tensor([0.05, 0.9, 0.04, 0.8, 0.7, 0.03, 0.02, 0.01])
    text = torch.tensor([[0.0, 1.0]])
    x = torch.tensor([[1.0, 0.0]]).repeat(8, 1)
    x[[3, 6]] = torch.tensor([0.0, 1.0])
    tokens = one(x, cls_attn=attention, text=text)
    assert kept("image_text", tokens, 6, variant="paper") == [0, 1, 3, 4]  # the knee: 4 tokens down to the flat part
    assert kept("image_text", tokens, 2) == [1, 3]
    assert kept("image_text", tokens, 1, use_text=True) == [3]  # token 6 fits too, and lies behind the knee
    assert kept("image_text", tokens, 5) == [0, 1, 2, 3, 4]


def test_correlation_lets_repeats_set_the_count():
    x = torch.eye(4).repeat(6, 1)
    attention = torch.arange(1.0, N + 1)[:, None].repeat(1, 2)
    attention[:, 1] = attention[:, 1].flip(0)
    tokens = one(x, (1, H, W), cls_attn=attention)
    drawn = kept("correlation", tokens, 20, variant="paper")
    assert len(drawn) == 4  # four different tokens out of 24
    assert kept("correlation", tokens, 6) == [0, 1, 2, 21, 22, 23]  # three of each layer
    assert kept("correlation", tokens, 3, variant="paper", tau=1.01) != kept("correlation", tokens, 3)


def test_correlation_draws_in_proportion():
    weight = torch.tensor([1.0, 2.0, 5.0]).repeat(800)[:, None]
    tokens = one(torch.eye(3).repeat(800, 1), (800, 1, 3), cls_attn=weight)  # each frame draws one token by itself
    drawn = build("correlation", variant="paper").reduce(tokens, Budget.count(800), torch.Generator().manual_seed(0))
    hits = torch.bincount(drawn.index % 3, minlength=3)
    torch.testing.assert_close(hits / 800, torch.tensor([1 / 8, 2 / 8, 5 / 8]), atol=0.06, rtol=0)


@pytest.mark.parametrize("count", [1, 9, 40])
def test_coverage_with_and_without_its_matrix_makes_the_same_choice(count):
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(count))
    x = torch.cat([x, x[:20]])  # equal tokens: ties everywhere
    q = unit_rows(x)[None]
    cover = Cover(cosines(q), q.new_zeros(1, 80), -1.0)
    held, lazy = greedy(cover, count), greedy(cover, count, held_bytes=0)
    assert held[0].tolist() == lazy[0].tolist()
    assert held[1].tolist() == lazy[1].tolist()
    assert int(held[0].max()) < 60


@pytest.mark.parametrize("count", [2, 17])
def test_mmtoks_coverage_with_and_without_its_matrix_makes_the_same_choice(count, monkeypatch):
    _, _, tokens = data(frames=3, seed=count)
    for variant in ("best", "released"):
        held = build("mmtok", variant=variant).reduce(tokens, Budget.count(count))
        monkeypatch.setattr("token_reduction.reducers.mmtok.greedy", lambda cover, k: greedy(cover, k, held_bytes=0))
        lazy = build("mmtok", variant=variant).reduce(tokens, Budget.count(count))
        monkeypatch.undo()
        assert held.index.tolist() == lazy.index.tolist()
        assert held.scores.tolist() == lazy.scores.tolist()

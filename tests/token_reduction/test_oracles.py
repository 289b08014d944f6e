"""Each method against the same method written as plain loops (`naive`), on data of its own."""

from __future__ import annotations

import pytest
import torch

from tests.token_reduction import naive
from tests.token_reduction.cases import one
from token_reduction import Budget, build
from token_reduction.exact import unit_rows
from token_reduction.selectors.coverage import Cover, cosines, greedy
from token_reduction.selectors.diversity import dpp_of

H, W = 4, 6
N = H * W


def data(frames: int = 1, seed: int = 0, width: int = 9):
    g = torch.Generator().manual_seed(seed)
    n = frames * N
    x = torch.randn(n, width, generator=g)
    channels = {
        "cls_attn": torch.rand(n, generator=g) ** 3,
        "keys": torch.randn(n, 8, generator=g),
        "queries": torch.randn(n, 8, generator=g),
        "recv_attn": torch.rand(n, 2, generator=g),
        "patches": torch.randn(n, width, generator=g),
        "text": torch.randn(5, width, generator=g),
    }
    return x, channels, one(x, (frames, H, W), **channels)


def kept(name, tokens, count, **options):
    return build(name, **options).reduce(tokens, Budget.count(count)).index.tolist()


def same_rows(name, tokens, count, expected, **options):
    anchors, matrix = expected
    reduction = build(name, **options).reduce(tokens, Budget.count(count))
    assert reduction.index.tolist() == anchors
    torch.testing.assert_close(reduction.dense(), matrix, atol=1e-6, rtol=1e-6)


SEEDS = pytest.mark.parametrize(("seed", "count"), [(0, 7), (1, 12), (2, 3), (3, 20)])


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
    assert kept("mmtok", tokens, count) == naive.mmtok(x, text, count, 0.5, 0.2, 0.02)
    assert kept("mmtok", tokens, count, variant="released") == naive.mmtok(x, text, count, 0.5, 0.2, 0.01)
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
        assert dpp_of(lambda i: kernel[i], kernel.diagonal(), count, 4).tolist() == order == naive.dpp(kernel, count)


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


@SEEDS
def test_visionzip_and_visiondrop_rows(seed, count):
    _x, channels, tokens = data(seed=seed)
    attention, keys = channels["cls_attn"], channels["keys"]
    for name, share in (("visionzip", 10 / 64), ("visiondrop", 6 / 48)):
        same_rows(name, tokens, count, naive.visionzip(attention, keys, count, share, False))
        same_rows(name, tokens, count, naive.visionzip(attention, keys, count, share, True), variant="released")


@SEEDS
def test_prumerge_rows(seed, count):
    _x, channels, tokens = data(seed=seed)
    attention, keys = channels["cls_attn"], channels["keys"]
    chosen = naive.best(attention, count - 1)
    same_rows("prumerge", tokens, count, naive.prumerge(attention, keys, chosen, 32, True))
    same_rows("prumerge", tokens, count, naive.prumerge(attention, keys, chosen, 4, True), neighbours=4)


def test_prumerge_as_published_counts_attention_outliers_and_does_not_divide():
    _, channels, _ = data(frames=1)
    attention = torch.full((N,), 0.01) + 1e-5 * torch.arange(N)
    attention[[3, 9, 17]] = torch.tensor([0.4, 0.3, 0.2])
    tokens = one(torch.randn(N, 5), (1, H, W), cls_attn=attention, keys=channels["keys"])
    expected = naive.prumerge(attention, channels["keys"], [3, 9, 17], 32, False)
    same_rows("prumerge", tokens, 10, expected, variant="paper")
    assert build("prumerge", variant="paper").adaptive
    grid = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]  # stride int(24 / 3) = 8, a third of it is 2
    plus = naive.prumerge(attention, channels["keys"], [3, 9, 17, *grid], 32, False)
    same_rows("prumerge_plus", tokens, 20, plus, variant="paper")


def test_prumerge_plus_keeps_a_published_share_by_attention_and_spreads_the_rest():
    _, channels, tokens = data(seed=4)
    attention = channels["cls_attn"]
    first = naive.best(attention, round(13 / 64 * 11))
    left = [j for j in range(N) if j not in first]
    grid = [left[(2 * i + 1) * len(left) // (2 * 9)] for i in range(9)]
    same_rows("prumerge_plus", tokens, 12, naive.prumerge(attention, channels["keys"], [*first, *grid], 32, True))


@SEEDS
def test_token_transforming_rows(seed, count):
    x, channels, tokens = data(seed=seed)
    attention = channels["cls_attn"]
    same_rows("token_transforming", tokens, count, naive.transforming(x, attention, count, 10.0, 32))
    same_rows("token_transforming", tokens, count, naive.transforming(x, attention, count, 3.0, 5), temperature=3.0, sources=5)  # fmt: skip
    pruned = build("token_transforming", sources=1).reduce(tokens, Budget.count(count))
    assert pruned.one_hot and pruned.index.tolist() == sorted(naive.best(attention, count))


@SEEDS
def test_aim_and_tome_rows(seed, count):
    x, channels, tokens = data(seed=seed)
    same_rows("aim", tokens, count, naive.bipartite(x, count, None, False, False))
    same_rows("aim", tokens, count, naive.bipartite(x, count, None, False, True), variant="released")
    keys = channels["keys"]
    for r in (3, 16):
        same_rows("tome", tokens, count, naive.bipartite(keys, count, r, True, False), per_round=r)


def test_aim_in_two_rounds_keeps_a_quarter_and_tome_its_toy():
    _x, _, tokens = data(seed=6)
    assert len(kept("aim", tokens, N // 4)) == 6
    toy = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 1.0]])
    reduction = build("tome", per_round=1).reduce(one(toy, keys=toy), Budget.count(3))
    torch.testing.assert_close(reduction.apply(toy), torch.tensor([[1.0, 0.05], [0.0, 1.0], [1.0, 1.0]]))
    assert reduction.sizes.tolist() == [2, 1, 1]
    torch.testing.assert_close(reduction.log_sizes(), torch.tensor([2.0, 1.0, 1.0]).log())


@SEEDS
def test_density_peak_rows(seed, count):
    x, channels, tokens = data(seed=seed)
    same_rows("setok", tokens, count, naive.setok(x, count, 5))
    same_rows("vmtc", tokens, count, naive.vmtc(x, channels["cls_attn"], count, 0.5, 5))


def test_setok_as_published_finds_as_many_clusters_as_there_are():
    centres = 10 * torch.eye(3)
    x = centres[torch.arange(N) % 3] + 0.01 * torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
    reduction = build("setok", variant="paper").reduce(one(x, (1, H, W)), Budget.count(12))
    assert reduction.index.numel() == 3
    assert sorted(reduction.sizes.tolist()) == [8, 8, 8]
    of = [tuple(c % 3 for c in reduction.source[reduction.row == row].tolist()) for row in range(3)]
    assert sorted(of) == [(0,) * 8, (1,) * 8, (2,) * 8]


@pytest.mark.parametrize("count", [4, 9, 15])
def test_centerclip_medoids_by_segment(count):
    x, _, tokens = data(frames=5, seed=count)
    far = lambda part: int(part.norm(dim=1).argmax())  # noqa: E731
    assert kept("centerclip", tokens, count) == naive.centerclip(x, 5, N, 2, count, far)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    first = int(x.norm(dim=1).argmax())
    expected = naive.centerclip(unit, 5, N, 5, 3, lambda part: first)
    assert kept("centerclip", tokens, 3, distance="cosine", frames=5) == expected


def test_centerclip_spectral_separates_rings_that_medoids_cannot():
    angle = torch.arange(40) * (2 * torch.pi / 40)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.cat([circle, 4 * circle])
    tokens = one(x, (1, 1, 80))
    reduction = build("centerclip", algorithm="spectral", sigma=0.05, aggregate="mean").reduce(tokens, Budget.count(2))
    groups = [set(reduction.source[reduction.row == r].tolist()) for r in range(2)]
    assert sorted(map(min, groups)) == [0, 40] and sorted(map(len, groups)) == [40, 40]
    medoids = build("centerclip", aggregate="mean").reduce(tokens, Budget.count(2))
    assert {int(medoids.source[medoids.row == r].max()) // 40 for r in range(2)} == {1}


@pytest.mark.parametrize(("count", "m", "t"), [(6, 2, 1.0), (12, 3, 1.2), (20, 12, 0.5), (3, 1, 99.0), (23, 2, 1.0)])
def test_vflowopt_rows(count, m, t):
    _, channels, tokens = data(seed=count)
    expected = naive.vflowopt(channels["queries"], channels["keys"], H, W, 2, t, m, count)
    same_rows("vflowopt", tokens, count, expected, heads=2, t=t, m=m)


def test_vflowopt_prefers_patches_with_much_in_them():
    flat = torch.full((4, 16), 0.5)
    flat[2] = torch.arange(16) / 15  # 16 grey levels, 4 bits; the others 0
    same = torch.ones(4, 2)
    tokens = one(same.clone(), queries=same, keys=same, pixels=flat)
    assert kept("vflowopt", tokens, 1, alpha_v=1.0, m=1) == [2]
    assert kept("vflowopt", tokens, 1, alpha_v=-1.0, m=1) == [0]


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
    weight = torch.tensor([1.0, 2.0, 5.0])[:, None]
    tokens, hits = one(torch.eye(3), cls_attn=weight), torch.zeros(3)
    chance, method = torch.Generator().manual_seed(0), build("correlation", variant="paper")
    for _ in range(800):
        hits[method.reduce(tokens, Budget.count(1), chance).index] += 1
    torch.testing.assert_close(hits / 800, torch.tensor([1 / 8, 2 / 8, 5 / 8]), atol=0.06, rtol=0)


@pytest.mark.parametrize("count", [1, 9, 40])
def test_coverage_with_and_without_its_matrix_makes_the_same_choice(count):
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(count))
    x = torch.cat([x, x[:20]])  # equal tokens: ties everywhere
    q = unit_rows(x)
    cover = Cover(cosines(q), 80, 80, q.new_zeros(80), -1.0)
    held, lazy = greedy(cover, count), greedy(cover, count, held_bytes=0)
    assert held[0].tolist() == lazy[0].tolist()
    assert held[1].tolist() == lazy[1].tolist()
    assert int(held[0].max()) < 60

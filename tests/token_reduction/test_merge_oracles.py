"""Merging and clustering methods against plain loops (`naive_merges`), on data of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.token_reduction import naive, naive_merges
from tests.token_reduction.cases import one
from tests.token_reduction.oracle_cases import SEEDS, H, N, W, data, kept, same_rows
from token_reduction import Budget, build
from token_reduction.reducers.prumerge import outliers


@SEEDS
def test_visionzip_and_visiondrop_rows(seed, count):
    _x, channels, tokens = data(seed=seed)
    attention, keys = channels["cls_attn"], channels["keys"]
    for name, share in (("visionzip", 10 / 64), ("visiondrop", 6 / 48)):
        same_rows(name, tokens, count, naive_merges.visionzip(attention, keys, count, share, False))
        same_rows(name, tokens, count, naive_merges.visionzip(attention, keys, count, share, True), variant="released")


@SEEDS
def test_prumerge_rows(seed, count):
    _x, channels, tokens = data(seed=seed)
    attention, keys = channels["cls_attn"], channels["keys"]
    chosen = naive.best(attention, count - 1)
    same_rows("prumerge", tokens, count, naive_merges.prumerge(attention, keys, chosen, 32, True))
    same_rows("prumerge", tokens, count, naive_merges.prumerge(attention, keys, chosen, 4, True), neighbours=4)


def test_prumerge_as_published_counts_attention_outliers_and_does_not_divide():
    _, channels, _ = data(frames=1)
    attention = torch.full((N,), 0.01) + 1e-5 * torch.arange(N)
    attention[[3, 9, 17]] = torch.tensor([0.4, 0.3, 0.2])
    tokens = one(torch.randn(N, 5), (1, H, W), cls_attn=attention, keys=channels["keys"])
    expected = naive_merges.prumerge(attention, channels["keys"], [3, 9, 17], 32, False)
    same_rows("prumerge", tokens, 10, expected, variant="paper")
    assert build("prumerge", variant="paper").adaptive
    grid = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]  # stride int(24 / 3) = 8, a third of it is 2
    plus = naive_merges.prumerge(attention, channels["keys"], [3, 9, 17, *grid], 32, False)
    same_rows("prumerge_plus", tokens, 20, plus, variant="paper")


def test_prumerge_as_released_joins_the_heads_before_the_softmax():
    g = torch.Generator().manual_seed(2)
    _, channels, _ = data()
    q, k = torch.randn(3, 4, generator=g, dtype=torch.float64), torch.randn(N, 3, 4, generator=g, dtype=torch.float64)
    k[[3, 9]] = q  # two outliers
    logits = torch.einsum("hd,nhd->nh", q, k) / 2.0  # 4 numbers a head
    attention = torch.softmax(k.flatten(1) @ q.flatten() / 12**0.5, 0)  # 12 numbers in all, no heads
    tokens = one(torch.randn(N, 5), (1, H, W), cls_logits=logits, keys=channels["keys"])
    chosen = [j for j in range(N) if float(attention[j]) > 4.0 / N]
    count = len(chosen) + 6
    expected = naive_merges.prumerge(attention, channels["keys"], naive.best(attention, outliers(attention)), 32, False)
    same_rows("prumerge", tokens, count, expected, variant="released")
    with pytest.raises(ValueError, match="needs the channels cls_logits, keys"):
        kept("prumerge", data()[2], 5, variant="released")


def test_prumerge_plus_keeps_a_published_share_by_attention_and_spreads_the_rest():
    _, channels, tokens = data(seed=4)
    attention = channels["cls_attn"]
    first = naive.best(attention, round(13 / 64 * 11))
    left = [j for j in range(N) if j not in first]
    grid = [left[(2 * i + 1) * len(left) // (2 * 9)] for i in range(9)]
    same_rows(
        "prumerge_plus", tokens, 12, naive_merges.prumerge(attention, channels["keys"], [*first, *grid], 32, True)
    )


@SEEDS
def test_token_transforming_rows(seed, count):
    x, channels, tokens = data(seed=seed)
    attention = channels["cls_attn"]
    same_rows("token_transforming", tokens, count, naive_merges.transforming(x, attention, count, 10.0, 32))
    same_rows(
        "token_transforming",
        tokens,
        count,
        naive_merges.transforming(x, attention, count, 3.0, 5),
        temperature=3.0,
        sources=5,
    )
    pruned = build("token_transforming", sources=1).reduce(tokens, Budget.count(count))
    assert pruned.one_hot and pruned.index.tolist() == sorted(naive.best(attention, count))


@SEEDS
def test_aim_and_tome_rows(seed, count):
    x, channels, tokens = data(seed=seed)
    same_rows("aim", tokens, count, naive_merges.bipartite(x, count, None, False, False))
    same_rows("aim", tokens, count, naive_merges.bipartite(x, count, None, False, True), variant="released")
    keys = channels["keys"]
    for r in (3, 16):
        same_rows("tome", tokens, count, naive_merges.bipartite(keys, count, r, True, False), per_round=r)


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
    same_rows("setok", tokens, count, naive_merges.setok(x, count, 5))
    same_rows("vmtc", tokens, count, naive_merges.vmtc(x, channels["cls_attn"], count, 0.5, 5))


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
    assert kept("centerclip", tokens, count) == naive_merges.centerclip(x, 5, N, 2, count, far)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    first = int(x.norm(dim=1).argmax())
    expected = naive_merges.centerclip(unit, 5, N, 5, 3, lambda part: first)
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


@pytest.mark.parametrize(("graph", "variant"), [("knn", "best"), ("heat", "best"), ("heat", "released")])
def test_centerclip_spectral_rows(graph, variant):
    """Against numpy's own singular vectors of a Laplacian that is put together entry by entry."""
    x = 3.0 * torch.randn(14, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    d, n, k = torch.cdist(x[None], x[None])[0].numpy(), 14, 4
    if graph == "knn":
        near = [sorted((j for j in range(n) if j != i), key=lambda j, i=i: d[i, j])[:3] for i in range(n)]
        a = np.array([[float(j in near[i] or i in near[j]) for j in range(n)] for i in range(n)])
    else:
        a = np.exp(-((d / (1.0 if variant == "released" else float(x.norm(dim=1).max()))) ** 2) / 2 / 1.5**2)
    laplacian = np.eye(n) - a / np.sqrt(np.outer(a.sum(0), a.sum(0)))
    rows = np.linalg.svd(laplacian)[0][:, -k:]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    apart = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    expected = sorted(naive_merges.medoids(apart.tolist(), 4, int((apart**2).sum(0).argmin())))
    own = {"sigma": 1.5} if graph == "heat" else {"neighbours": 3}
    options = {"algorithm": "spectral", "graph": graph, "variant": variant} | own
    assert kept("centerclip", one(x.float(), (1, 2, 7)), 4, **options) == expected


def test_centerclip_links_five_neighbours_for_each_frame_of_a_segment():
    tokens = data(frames=2)[2]
    spectral = {"algorithm": "spectral", "graph": "knn"}
    assert kept("centerclip", tokens, 6, **spectral) == kept("centerclip", tokens, 6, neighbours=10, **spectral)
    assert kept("centerclip", tokens, 6, **spectral) != kept("centerclip", tokens, 6, neighbours=2, **spectral)


@pytest.mark.parametrize(("count", "m", "t"), [(6, 2, 1.0), (12, 3, 1.2), (20, 12, 0.5), (3, 1, 99.0), (23, 2, 1.0)])
def test_vflowopt_rows(count, m, t):
    _, channels, tokens = data(seed=count)
    expected = naive_merges.vflowopt(channels["queries"], channels["keys"], H, W, 2, t, m, count)
    same_rows("vflowopt", tokens, count, expected, heads=2, t=t, m=m)
    apart = {name: channels[name].view(N, 2, -1) for name in ("queries", "keys")}
    told = one(tokens.x, (1, H, W), **apart)
    same_rows("vflowopt", told, count, expected, t=t, m=m)
    averaged = one(tokens.x, (1, H, W), keys=apart["keys"].mean(1))
    merged = build("tome").reduce(one(tokens.x, (1, H, W), keys=apart["keys"]), Budget.count(count))
    assert torch.equal(merged.dense(), build("tome").reduce(averaged, Budget.count(count)).dense())


def test_vflowopt_as_released_joins_nothing_in_a_video():
    _, channels, video = data(frames=2, seed=3)
    picture = video.item(0)
    queries, keys = channels["queries"][:N], channels["keys"][:N]
    alone = one(picture.x[:N], (1, H, W), queries=queries, keys=keys)
    expected = naive_merges.vflowopt(queries, keys, H, W, 1, 2.0, 3, 8)
    same_rows("vflowopt", alone, 8, expected, m=3, variant="released")
    score = build("vflowopt").reduce(alone, Budget.count(8)).scores
    released = build("vflowopt", m=3, variant="released").reduce(video, Budget.count(16))
    assert released.one_hot and released.index[:8].tolist() == sorted(naive.best(score, 8))
    assert not build("vflowopt", m=3).reduce(video, Budget.count(16)).one_hot
    assert build("vflowopt", recycle=False).reduce(alone, Budget.count(8)).one_hot
    both = build("vflowopt", m=3, variant="released", recycle=True).reduce(video, Budget.count(16))
    assert torch.equal(both.dense()[:8, :N], expected[1])


def test_vflowopt_prefers_patches_with_much_in_them():
    flat = torch.full((4, 16), 0.5)
    flat[2] = torch.arange(16) / 15  # 16 grey levels, 4 bits; the others 0
    same = torch.ones(4, 2)
    tokens = one(same.clone(), queries=same, keys=same, pixels=flat)
    assert kept("vflowopt", tokens, 1, alpha_v=1.0, m=1) == [2]
    assert kept("vflowopt", tokens, 1, alpha_v=-1.0, m=1) == [0]

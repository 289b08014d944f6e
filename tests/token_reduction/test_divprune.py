"""DivPrune against a brute-force oracle, and what it promises about ties and duplicates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.token_reduction.cases import keep, one
from token_reduction import Budget, VisualTokens, build
from token_reduction.isolation import most_isolated
from token_reduction.rows import UnitRows
from tokenring.transport import connect


def brute_force(x: Tensor, count: int, center: bool = False) -> tuple[list[int], dict[int, float], float]:
    """Straight from the definition, float64, all pairs: kept indices, their distances, the closest call of any arg-max."""
    x = x.double() - (x.double().mean(0) if center else 0.0)
    n = x.shape[0]
    distance = 1 - torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    score = [min(float(distance[i, j]) for j in range(n) if j != i) for i in range(n)]
    kept: dict[int, float] = {}
    closest = float("inf")
    while len(kept) < count:
        left = sorted((i for i in range(n) if i not in kept), key=lambda i: -score[i])
        if len(left) > 1:
            closest = min(closest, score[left[0]] - score[left[1]])
        kept[left[0]] = score[left[0]]
        score = [min(float(distance[i, j]) for j in kept) for i in range(n)]
    return sorted(kept), kept, closest


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_divprune_equals_brute_force(seed, center):
    x = torch.randn(40 + seed, 6, generator=torch.Generator().manual_seed(seed)) + 1.0
    expected, distances, closest = brute_force(x, 15, center)
    assert closest > 1e-6, "the case is too close to call for an oracle with its own rounding"
    reduction = build("divprune", center=center).reduce(one(x), Budget.count(15))
    assert reduction.index.tolist() == expected
    scores = reduction.scores[reduction.index].tolist()
    assert scores == pytest.approx([distances[i] for i in expected], abs=1e-6)


def test_centering_changes_the_choice():
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(1)) + 3.0
    assert keep("divprune", x, Budget.count(10)) != keep(build("divprune", center=True), x, Budget.count(10))


def test_the_first_choice_is_the_most_isolated_token():
    for seed in range(5):
        x = torch.randn(300, 5, generator=torch.Generator().manual_seed(seed))
        expected, *_ = brute_force(x, 1)
        assert keep("divprune", x, Budget.count(1)) == expected


def test_the_rounds_do_not_show_in_a_long_run():
    """More choices than one pool can hold, against a plain loop over a distance matrix."""
    x = torch.randn(1500, 16, generator=torch.Generator().manual_seed(2))
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    distance = 1 - unit @ unit.T
    nearest = distance.clone().fill_diagonal_(9).amin(1)
    best, kept = int(nearest.argmax()), []
    running = torch.full((1500,), 9.0, dtype=torch.float64)
    while len(kept) < 900:
        kept.append(best)
        running = torch.minimum(running, distance[best])
        running[kept] = -1
        best = int(running.argmax())
    assert keep("divprune", x, Budget.count(900)) == sorted(kept)


def test_ties_go_to_the_lowest_index():
    # eight axes, all at distance 1 from each other
    assert keep("divprune", torch.eye(8), Budget.count(3)) == [0, 1, 2]
    both_ways = torch.cat([torch.eye(4), -torch.eye(4)])
    # first 0 (all tie), then its opposite 4 at distance 2, then all at distance 1
    assert keep("divprune", both_ways, Budget.count(4)) == [0, 1, 2, 4]


def test_duplicates_are_taken_last_and_never_twice():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).repeat(5, 1)
    assert keep("divprune", x, Budget.count(6)) == [0, 1, 2, 3, 4, 5]
    assert keep("divprune", x, Budget.count(9)) == list(range(9))
    assert keep("divprune", x, Budget.count(30)) == list(range(30))
    scaled = torch.tensor([[1.0, 2.0], [2.0, 4.0], [-1.0, 0.5]])
    assert keep("divprune", scaled, Budget.count(2)) == [0, 2] or keep("divprune", scaled, Budget.count(2)) == [1, 2]


def test_all_equal_tokens_keep_the_first_ones():
    assert keep("divprune", torch.ones(700, 3), Budget.count(600)) == list(range(600))


def test_released_takes_tokens_again_where_only_duplicates_are_left():
    x = torch.eye(3).repeat(2, 1)
    assert keep(build("divprune", variant="released"), x, Budget.count(5)) == [0, 0, 0, 1, 2]
    assert keep(build("divprune", variant="released"), x, Budget.count(3)) == [0, 1, 2]
    again = build("divprune", variant="released").reduce(one(x[:5]), Budget.count(5))
    assert again.index.tolist() == [0, 0, 0, 1, 2]
    assert again.scores.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]  # the first time counts
    assert keep(build("divprune", variant="paper"), x, Budget.count(5)) == [0, 1, 2, 3, 4]


def test_a_single_token_and_zero_rows_are_handled():
    assert keep("divprune", torch.ones(1, 4), Budget.ratio(0.1)) == [0]
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    assert keep("divprune", x, Budget.count(3)) == [0, 1, 3]


def test_scores_say_how_far_every_token_is_from_the_kept_ones():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(4))
    reduction = build("divprune").reduce(one(x), Budget.count(12))
    distance = 1 - torch.nn.functional.cosine_similarity(x[:, None].double(), x[None].double(), dim=-1)
    left = [i for i in range(50) if i not in reduction.index.tolist()]
    expected = distance[left][:, reduction.index].amin(1)
    torch.testing.assert_close(reduction.scores[left].double(), expected, atol=1e-6, rtol=0)


def test_a_tie_that_is_measured_late_still_goes_to_the_lowest_index():
    """Forty pairs, all equally isolated; only the first pair is adjacent, so the search knows its bound from the start."""
    axes, partners = torch.eye(80)[:40], torch.eye(80)[:40] + torch.eye(80)[40:]
    x = torch.cat([axes[:1], partners[:1], axes[1:], partners[1:]])
    assert most_isolated(UnitRows(x), torch.arange(80), connect(None), strides=(1,)).index == 0


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 10**6), st.booleans())
def test_the_search_for_the_first_equals_all_pairs(rows, width, seed, coarse):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    x = x.round() if coarse else x  # coarse: many exact ties, duplicates and zero rows
    units = UnitRows(x)
    pairs = torch.full((rows, rows), float("inf"), dtype=torch.float64)
    for part, distance in units.distances(None, units.take(slice(0, rows)), units.half):
        pairs[part] = distance
    nearest = pairs.fill_diagonal_(float("inf")).amin(1)
    for strides in ((), (1, 7)):
        found = most_isolated(units, torch.arange(rows), connect(None), strides)
        assert found.index == int(nearest.argmax())
        assert found.distance == float(nearest.max())


@pytest.mark.parametrize("center", [False, True])
def test_many_small_items_at_once_equal_one_after_another(center, monkeypatch):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5 * 30, 7, generator=g)
    x[30:45] = x[45:60]  # duplicates
    x[70] = 0
    tokens = VisualTokens(x, [30 * i for i in range(6)], [(2, 3, 5)] * 5, torch.arange(150)[None])
    for count in (1, 8, 30):
        method = build("divprune", center=center)
        together = method.reduce(tokens, Budget.count(count))
        monkeypatch.setattr("token_reduction.reducers.divprune.SMALL", 0)
        alone = method.reduce(tokens, Budget.count(count))
        monkeypatch.undo()
        assert together.index.tolist() == alone.index.tolist()
        assert together.scores.tolist() == alone.scores.tolist()

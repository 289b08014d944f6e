"""What every method promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.token_reduction.cases import GRIDS, METHODS, batch, keep, one
from token_reduction import Budget, build, methods
from token_reduction.reducers.pool import output_grid

BUDGETS = [Budget.ratio(0.34), Budget.count(9), Budget.ratio(1.0), Budget.count(1000)]
ALL = [(name, budget) for name in METHODS for budget in BUDGETS] + [("identity", Budget.ratio(1.0))]


def test_every_method_says_what_it_needs_costs_and_where_it_comes_from():
    assert len(methods()) >= 35
    for name, method in methods().items():
        assert method.name == name
        assert method.form in ("authors'", "ours")
        assert method.cost.startswith("O(")
        assert method.source
        assert set(method.needs) == set(build(name).needs)


@pytest.mark.parametrize(("name", "budget"), ALL)
def test_the_count_is_exact_and_the_order_rises_inside_every_item(name, budget):
    tokens, method = batch(), build(name)
    reduction = method.reduce(tokens, budget)
    assert reduction.cu_seqlens.diff().tolist() == method.count(tokens.grid, budget)
    for item, (first, last) in enumerate(zip(reduction.cu_seqlens[:-1], reduction.cu_seqlens[1:], strict=True)):
        index = reduction.index[first:last]
        assert bool((index.diff() > 0).all())
        assert int(index[0]) >= int(tokens.cu_seqlens[item])
        assert int(index[-1]) < int(tokens.cu_seqlens[item + 1])
    assert reduction.global_index.tolist() == reduction.index.tolist()
    if tokens.lengths == method.count(tokens.grid, budget):
        assert reduction.index.tolist() == list(range(tokens.x.shape[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_a_ragged_batch_equals_a_loop_over_its_items(name, dtype):
    tokens, method, budget = batch(dtype=dtype), build(name), Budget.ratio(0.4)
    together, alone = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    reduction = method.reduce(tokens, budget, together)
    loop = [method.reduce(tokens.item(i), budget, alone) for i in range(len(GRIDS))]
    starts = tokens.cu_seqlens[:-1].tolist()
    assert reduction.index.tolist() == [int(i) + s for part, s in zip(loop, starts, strict=True) for i in part.index]
    assert bool((reduction.apply(tokens.x) == torch.cat([p.apply(tokens.item(i).x) for i, p in enumerate(loop)])).all())
    if reduction.scores is not None:
        assert reduction.scores.tolist() == torch.cat([part.scores for part in loop]).tolist()


@pytest.mark.parametrize("name", METHODS)
def test_the_same_input_gives_the_same_result_and_is_left_as_it_was(name):
    tokens, budget = batch(dtype=torch.float64), Budget.ratio(0.3)
    channels = {key: value.double() for key, value in tokens.channels.items() if key != "text"}
    tokens = replace(tokens, channels={**tokens.channels, **channels})
    before = {key: value.clone() for key, value in {"x": tokens.x, **channels}.items()}
    method = build(name, center=True) if name in ("divprune", "evs") else build(name)
    first, second = method.reduce(tokens, budget), method.reduce(tokens, budget)
    assert first.index.tolist() == second.index.tolist()
    assert all(torch.equal(value, before[key]) for key, value in {"x": tokens.x, **channels}.items())


def test_an_item_without_rows_keeps_none():
    tokens = batch(((0, 2, 2), (1, 2, 2)))
    for name in METHODS:
        assert build(name).reduce(tokens, Budget.ratio(0.5)).cu_seqlens.tolist()[:2] == [0, 0]


def test_channels_that_a_method_needs_are_asked_for():
    class Attentive(type(build("uniform"))):
        name = "attentive"
        needs = frozenset({"cls_attn"})

    bare = one(torch.randn(16, 4))
    with pytest.raises(ValueError, match="attentive needs the channels cls_attn; the tokens lack cls_attn"):
        Attentive().reduce(bare, Budget.ratio(0.5))
    for name, method in methods().items():
        if method.needs:
            with pytest.raises(ValueError, match=f"{name} needs the channels .*; the tokens lack {method.needs[0]}"):
                build(name).reduce(bare, Budget.ratio(0.5))


def test_uniform_takes_the_middles_of_equal_stretches():
    x = torch.zeros(12, 2)
    assert keep("uniform", x, Budget.count(4)) == [1, 4, 7, 10]
    assert keep("uniform", x, Budget.count(5)) == [1, 3, 6, 8, 10]
    assert keep("uniform", x, Budget.count(1)) == [6]
    assert keep("uniform", x, Budget.count(12)) == list(range(12))


def test_random_follows_its_seed_or_the_generator_it_is_given():
    tokens, budget = batch(), Budget.ratio(0.3)
    by_seed = build("random", seed=7).reduce(tokens, budget).index.tolist()
    by_generator = build("random").reduce(tokens, budget, torch.Generator().manual_seed(7)).index.tolist()
    assert by_seed == by_generator
    assert by_seed != build("random", seed=8).reduce(tokens, budget).index.tolist()


def test_random_draws_every_token_equally_often():
    generator, hits = torch.Generator().manual_seed(0), torch.zeros(10)
    for _ in range(2000):
        hits[build("random").reduce(one(torch.zeros(10, 1)), Budget.count(3), generator).index] += 1
    assert hits.sum() == 6000
    assert float((hits - 600).abs().max()) < 100  # five standard deviations


def test_pool_equals_average_pooling_where_the_grid_divides():
    x = torch.randn(3 * 8 * 8, 5, generator=torch.Generator().manual_seed(0))
    reduction = build("pool").reduce(one(x, (3, 8, 8)), Budget.ratio(0.25))
    image = x.view(3, 8, 8, 5).permute(0, 3, 1, 2)
    expected = torch.nn.functional.avg_pool2d(image, 2).permute(0, 2, 3, 1).reshape(-1, 5)
    torch.testing.assert_close(reduction.apply(x), expected)
    assert reduction.sizes.tolist() == [4] * 48
    assert reduction.index[:5].tolist() == [0, 2, 4, 6, 16]


def test_pool_puts_each_token_in_one_cell_and_anchors_it_nearest_the_centre():
    x = torch.arange(35.0)[:, None]
    reduction = build("pool").reduce(one(x, (1, 5, 7)), Budget.count(6))
    # 2 x 3 cells: lines 0-1 | 2-4, columns 0-1 | 2-3 | 4-6
    lines, columns = [(0, 2), (2, 5)], [(0, 2), (2, 4), (4, 7)]
    grid = x.view(5, 7)
    expected = [float(grid[a:b, c:d].mean()) for a, b in lines for c, d in columns]
    assert reduction.apply(x)[:, 0].tolist() == pytest.approx(expected)
    assert reduction.index.tolist() == [0, 2, 5, 21, 23, 26]
    assert sorted(reduction.source.tolist()) == list(range(35))


def test_pool_fits_the_budget_with_cells_that_are_not_stretched():
    assert output_grid(16, 16, 23) == (4, 5)
    assert output_grid(24, 24, 576) == (24, 24)
    for h, w in ((16, 16), (7, 19), (1, 12), (40, 3)):
        for cells in range(1, h * w + 1):
            a, b = output_grid(h, w, cells)
            assert 1 <= a * b <= cells
            assert a <= h
            assert b <= w
            assert output_grid(h, w, a * b) == (a, b)


def test_pool_refuses_less_than_one_token_per_frame():
    with pytest.raises(ValueError, match="item 1 has 9 frames and a budget of 8 tokens; raise the budget to 9"):
        build("pool").count([(2, 4, 4), (9, 4, 4)], Budget.count(8))


@pytest.mark.parametrize("name", ["divprune", "evs"])
def test_methods_that_compare_features_refuse_what_cannot_be_compared(name):
    x = torch.randn(8, 3)
    x[5, 1] = float("nan")
    with pytest.raises(ValueError, match=f"{name} compares features and x holds NaN or infinity"):
        build(name).reduce(one(x), Budget.count(8))


EVS_TOY = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])


def test_evs_toy_values():
    reduction = build("evs").reduce(one(EVS_TOY, (3, 1, 2)), Budget.ratio(0.5))
    assert reduction.scores.tolist() == pytest.approx([255.0, 255.0, 0.0, 1 - 0.5**0.5, 1.0, 0.0])
    assert reduction.index.tolist() == [0, 1, 4]
    assert keep("evs", EVS_TOY, Budget.ratio(1 - 0.9), (3, 1, 2)) == [0, 1]


def test_evs_breaks_ties_towards_the_lowest_index():
    x = torch.tensor([[3.0, 4.0]]).repeat(12, 1)
    assert keep("evs", x, Budget.count(7), (3, 2, 2)) == [0, 1, 2, 3, 4, 5, 6]
    assert keep("evs", x, Budget.count(2), (3, 2, 2)) == [0, 1]
    still = torch.ones(3 * 400, 2)  # long enough for an unstable sort to show
    assert keep("evs", still, Budget.count(700), (3, 20, 20)) == list(range(700))


def test_evs_keeps_at_least_one_frame_of_a_ratio_and_floors_it():
    method = build("evs")
    assert method.count([(8, 4, 4), (3, 4, 4)], Budget.ratio(0.01)) == [16, 16]
    assert method.count([(7, 3, 3)], Budget.ratio(0.3)) == [18]


def variants():
    return [(name, variant) for name in METHODS for variant in ("paper", "released")]


@pytest.mark.parametrize(("name", "variant"), variants())
def test_every_variant_keeps_its_count_or_says_that_it_is_an_upper_bound(name, variant):
    tokens, method = batch(), build(name, variant=variant)
    for budget in (Budget.ratio(0.3), Budget.ratio(1.0)):
        kept, count = method.reduce(tokens, budget).cu_seqlens.diff().tolist(), method.count(tokens.grid, budget)
        if method.adaptive:
            assert all(0 < k <= c for k, c in zip(kept, count, strict=True))
        else:
            assert kept == count


def test_published_forms_that_let_the_data_decide_really_do():
    adaptive = {name for name in METHODS if build(name, variant="paper").adaptive}
    assert adaptive == {"difffp", "setok", "image_text", "correlation", "prumerge", "prumerge_plus"}
    tokens = batch(((2, 8, 8),))
    for name in adaptive:
        assert build(name, variant="paper").reduce(tokens, Budget.count(120)).index.numel() <= 120
    assert build("prumerge", variant="paper").reduce(tokens, Budget.count(120)).index.numel() < 120

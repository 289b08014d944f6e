"""Budgets: parsing, rounding, windows, apportionment."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from token_reduction import Budget, build, from_spec, methods, parse, split_budget, windows


@pytest.mark.parametrize(
    ("text", "name", "budget"),
    [
        ("divprune:0.1", "divprune", Budget.ratio(0.1)),
        ("uniform:64", "uniform", Budget.count(64)),
        ("evs:25%", "evs", Budget.ratio(0.25)),
        ("pool:12.5%", "pool", Budget.ratio(0.125)),
        ("random:1", "random", Budget.count(1)),
        ("random:1.0", "random", Budget.ratio(1.0)),
        ("identity", "identity", Budget.ratio(1.0)),
    ],
)
def test_text_names_a_method_and_a_budget(text, name, budget):
    assert parse(text) == (name, budget)


def test_text_gives_options_of_every_kind():
    assert from_spec("divprune,center=true,variant=paper:64") == (
        build("divprune", center=True, variant="paper"),
        Budget.count(64),
    )
    assert from_spec("vflowopt,t=3,m=2.5,heads=none:0.5")[0] == build("vflowopt", t=3, m=2.5)
    for text, message in (
        ("divprune,center:0.1", "written name=value, got 'center'"),
        ("divprune,centre=true:0.1", "has no option centre; its options are variant, center"),
        ("divprune,center=true,center=false:0.1", "gives the option center twice"),
        ("vmtc,primary=half:0.1", "vmtc got primary='half'; give a finite number from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            from_spec(text)
    with pytest.raises(ValueError, match="has options, which this does not read"):
        parse("divprune,center=true:0.1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "dipvrune:0.1",
            "unknown reduction method 'dipvrune'; methods are identity, uniform, random, pool, downsample, divprune",
        ),
        ("", "unknown reduction method ''"),
        ("uniform", "uniform needs a budget.*write uniform:0.1"),
        ("uniform:", "needs a budget"),
        ("identity:0.5", "identity keeps every token and takes no budget"),
        ("uniform:0", "at least 1, got 0"),
        ("uniform:0.0", "above 0 and at most 1, got 0.0"),
        ("uniform:1.5", "at most 1, got 1.5"),
        ("uniform:150%", "at most 1, got 1.5"),
        ("uniform:-3", "'-3' is not a number that can be read"),
        ("uniform:1e-1", "give a ratio as 0.1 or 10%"),
        ("uniform:nan", "not a number"),
    ],
)
def test_text_that_is_no_budget_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make", [lambda: Budget.ratio(0), lambda: Budget.ratio(float("nan")), lambda: Budget.ratio(True)]
)
def test_a_ratio_outside_its_range_is_refused(make):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        make()


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_a_count_below_one_token_or_not_whole_is_refused(value):
    with pytest.raises(ValueError, match="at least 1"):
        Budget.count(value)


def test_a_ratio_rounds_as_divprune_does_and_keeps_at_least_one():
    assert [Budget.ratio(0.098).tokens(n) for n in (576, 2880, 4, 0)] == [56, 282, 1, 0]
    assert [Budget.ratio(0.5).tokens(n) for n in (5, 7)] == [2, 4]


@pytest.mark.parametrize("name", [name for name in methods() if name != "identity"])
def test_counts_come_from_the_grid_alone_item_by_item(name):
    method = build(name)
    counts = method.count([(4, 6, 6), (4, 6, 6), (2, 4, 4)], Budget.count(16))
    assert counts == [16, 16, 16]
    assert method.count([(2, 4, 4)], Budget.count(1000)) == [32]
    assert method.count([(0, 4, 4)], Budget.ratio(0.5)) == [0]
    with pytest.raises(ValueError, match="needs a Budget"):
        method.count([(2, 4, 4)], None)


def test_identity_takes_no_budget_that_would_drop_a_token():
    assert build("identity").count([(2, 4, 4)], None) == [32]
    assert build("identity").count([(2, 4, 4)], Budget.count(32)) == [32]
    with pytest.raises(ValueError, match="identity keeps every token"):
        build("identity").count([(2, 4, 4)], Budget.count(31))


@pytest.mark.parametrize(("name", "options"), [("evs", {"centre": True}), ("uniform", {"center": True})])
def test_an_option_that_a_method_does_not_have_is_refused(name, options):
    with pytest.raises(ValueError, match=f"{name} has no option"):
        build(name, **options)


@pytest.mark.parametrize("name", methods())
def test_every_method_takes_the_three_variants_and_no_other(name):
    assert {build(name, variant=variant).variant for variant in ("best", "paper", "released")} == {
        "best",
        "paper",
        "released",
    }
    with pytest.raises(ValueError, match=f"unknown variant 'fast' of {name}; variants are best, paper, released"):
        build(name, variant="fast")


def test_windows_cover_every_frame_once():
    assert windows(7, 3) == [(0, 3), (3, 6), (6, 7)]
    assert windows(3, 10) == [(0, 3)]
    with pytest.raises(ValueError, match="at least 1 frame"):
        windows(0, 3)
    with pytest.raises(ValueError, match="at least 1 frame"):
        windows(3, 0)


def test_a_ratio_holds_in_every_window():
    assert split_budget(Budget.ratio(0.3), [10, 20]) == [Budget.ratio(0.3)] * 2


def test_a_count_is_shared_by_largest_remainder():
    # shares 3.33, 3.33, 3.33 and 4.55, 4.55, 0.91: by hand
    assert split_budget(Budget.count(10), [50, 50, 50]) == [Budget.count(4), Budget.count(3), Budget.count(3)]
    assert split_budget(Budget.count(10), [50, 50, 10]) == [Budget.count(5), Budget.count(4), Budget.count(1)]
    assert split_budget(Budget.count(4), [1000, 1, 1]) == [Budget.count(2), Budget.count(1), Budget.count(1)]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.integers(1, 3000))
def test_shared_counts_sum_exactly_and_starve_no_window(counts, total):
    if total < len(counts):
        with pytest.raises(ValueError, match="cannot give each of"):
            split_budget(Budget.count(total), counts)
        return
    parts = [budget.tokens(10**9) for budget in split_budget(Budget.count(total), counts)]
    assert sum(parts) == min(total, sum(counts))
    assert all(1 <= part <= count for part, count in zip(parts, counts, strict=True))
    share = total / sum(counts)
    if share < 1 and all(share * count >= 1 for count in counts):
        assert all(abs(part - share * count) < 1 for part, count in zip(parts, counts, strict=True))


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="leave out empty windows"):
        split_budget(Budget.count(5), [3, 0])

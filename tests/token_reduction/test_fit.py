"""Fits on a model with a known answer, and on the small decoder."""

from __future__ import annotations

import pytest
import torch

from tests.token_reduction.inside_cases import WIDTH, decoder, prompt
from token_reduction import Budget, build
from token_reduction.fit import (
    Bayes,
    Plan,
    agreement,
    divergence,
    exit_labels,
    fit,
    fit_g_search,
    fit_p_sigmoid,
    fit_vflowopt,
    fit_withdrawal,
    train_gates,
)
from token_reduction.inside import DyVTE, DyVTEGates, Scheduled, prefill, vtw

HEAD = torch.randn(WIDTH, 11, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def logits(plan: Plan | None, samples: int = 4) -> torch.Tensor:
    runs = [
        prefill(decoder(), prompt(seed=s), None if plan is None else plan.policy).hidden[-1] for s in range(samples)
    ]
    return torch.stack(runs) @ HEAD


def lost(plan: Plan) -> float:
    return divergence(logits(None), logits(plan))


def test_withdrawal_finds_the_first_layer_within_the_bound():
    values = {layer: lost(Plan(policy=vtw(layer))) for layer in range(1, 6)}
    eta = sorted(values.values())[2]
    fitted = fit_withdrawal(lost, range(1, 6), eta)
    expected = next(layer for layer in range(1, 6) if values[layer] <= eta)
    assert fitted.plan.policy.schedule == {expected - 1: 0.0}
    assert fitted.value == values[expected] and len(fitted.tried) == expected
    with pytest.raises(ValueError, match="none of 5 plans is within the bound, the best value is"):
        fit_withdrawal(lost, range(1, 6), -1.0)


def test_g_search_finds_the_smallest_non_rising_shares_that_hold():
    need = {0: 0.75, 2: 0.5, 4: 0.1}  # a layer below its need costs 1

    def objective(plan: Plan) -> float:
        return float(sum(share < need[layer] for layer, share in plan.policy.schedule.items()))

    choices = [0.1, 0.25, 0.5, 0.75, 1.0]
    fitted = fit_g_search(objective, (0, 2, 4), 0.0, choices)
    assert fitted.plan.policy.schedule == {0: 0.75, 2: 0.5, 4: 0.1}
    assert fitted.value == 0.0
    rising = {0: 0.1, 2: 0.5}
    got = fit_g_search(lambda p: float(sum(s < rising[l] for l, s in p.policy.schedule.items())), (0, 2), 1.0, choices)  # noqa: E741
    assert got.plan.policy.schedule == {0: 0.1, 2: 0.1}  # never more than the layer before


def test_g_search_on_a_decoder_holds_its_bound():
    fitted = fit_g_search(lost, (1, 3), 0.05, [0.25, 0.5, 0.75, 1.0], scorer="flow")
    assert fitted.value <= 0.05
    assert fitted.plan.policy.schedule[1] >= fitted.plan.policy.schedule[3]


def test_bayes_comes_nearer_than_chance_and_follows_its_seed():
    def value(numbers):
        return (numbers[0] - 0.3) ** 2 + (numbers[1] + 2.0) ** 2 / 9

    def run(starts, seed=0):
        seen = {}

        def make(numbers):
            plan = Plan(ratio=0.5, method="vflowopt", options=dict(zip(("t", "alpha_v"), numbers)))
            seen[tuple(numbers)] = value(numbers)
            return plan

        def at(plan):
            return tuple(plan.options.values())

        found = fit(Bayes([(0, 1), (-4, 4)], make, calls=40, starts=starts, seed=seed), lambda p: seen[at(p)])
        return found.value, at(found.plan)

    guided, drawn = [run(8, s)[0] for s in range(3)], [run(40, s)[0] for s in range(3)]
    assert all(a < b for a, b in zip(guided, drawn, strict=True)) and max(guided) < 2e-3
    assert run(8) == run(8) != run(8, seed=1)


def test_p_sigmoid_meets_its_budget_and_beats_most_of_its_box():
    def objective(plan: Plan) -> float:
        return abs(plan.policy.schedule[2] - 0.9) + plan.policy.schedule[4]

    fitted = fit_p_sigmoid(objective, 6, 0.6, calls=25, starts=8)
    assert fitted.plan.cost(6) == pytest.approx(0.6, abs=1e-3)
    shares = list(fitted.plan.policy.schedule.values())
    assert shares == sorted(shares, reverse=True)
    values = sorted(value for _, value in fitted.tried)
    assert fitted.value == values[0] < values[len(values) // 2]


def test_vflowopt_solves_its_last_share_from_the_budget():
    fitted = fit_vflowopt(lambda p: abs(p.options["t"] - 20) / 50 + (p.ratio - 0.3) ** 2, 0.25, calls=30, starts=10)
    assert fitted.plan.cost(28) == pytest.approx(0.25, abs=1e-4)
    assert 0.25 <= fitted.plan.ratio <= 0.375 and abs(fitted.plan.options["t"] - 20) < 5
    # the values shipped for a quarter of the tokens meet the same budget
    shipped = Scheduled(schedule={8: 0.9833, 17: 0.9833 * 0.8773})
    assert Plan(policy=shipped, ratio=0.2651).cost(28) == pytest.approx(0.25, abs=2e-3)
    method = build(fitted.plan.method, **fitted.plan.options)
    assert method.count([(1, 16, 16)], Budget.ratio(fitted.plan.ratio))[0] == round(256 * fitted.plan.ratio)


def test_a_plan_survives_json_and_text_that_is_none_is_refused():
    plan = Plan(policy=vtw(4), method="todre", options={"diversity": "max-sum"}, ratio=0.1)
    assert Plan.from_json(plan.to_json()) == plan
    for text in ("[]", "{", '{"ratio": 1, "more": 2}'):
        with pytest.raises(ValueError, match="no plan"):
            Plan.from_json(text)


def test_objectives():
    a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.5, 3.0]])
    p, q = torch.softmax(a, 1), torch.softmax(b, 1)
    assert divergence(a, b) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)
    assert agreement(a, 3 * a) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="finite"):
        fit_withdrawal(lambda plan: float("nan"), range(1, 3), 0.1)


def test_gates_learn_when_the_picture_has_been_read_and_drop_it_then():
    """Text rows of prompts whose first coordinate says from which layer on the picture is not needed."""
    torch.manual_seed(0)
    gates = DyVTEGates(WIDTH, 6, hidden=32)
    g = torch.Generator().manual_seed(1)
    texts = torch.randn(600, 4, WIDTH, generator=g)
    features = torch.stack([DyVTEGates.features(text) for text in texts])
    layers = torch.randint(0, 6, (600,), generator=g)
    unchanged = (texts[:, -1, 0] > 0).float()
    labels = exit_labels(unchanged, torch.ones(600), torch.ones(600))
    before = float(torch.nn.functional.cross_entropy(gates(features, 0), labels).detach())
    after = train_gates(gates, features, layers, labels, steps=250, rate=3e-3)
    assert after < 0.5 * before
    right = [int(gates(f, int(l)).argmax() == y) for f, l, y in zip(features, layers, labels, strict=True)]  # noqa: E741
    assert sum(right) > 0.9 * 600
    p = prompt()
    for sign, least in ((1.0, 0), (-1.0, 1)):
        hidden = p.hidden.clone()
        hidden[-1, 0] = 9.0 * sign
        blocks = [Still() for _ in range(6)]
        state = prefill(blocks, type(p)(hidden, p.positions, p.kinds), DyVTE(gates=gates.double()))
        assert (len(state.rows) == 32) == bool(least)
        gates.float()


class Still(type(decoder(1)[0])):
    """A layer that leaves hidden states alone, so that only the gates speak."""

    def __init__(self):
        super().__init__(0)

    def finish(self, hidden, mixed, share):
        return hidden


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"ratio": 2}', "at most 1, got 2"),
        ('{"ratio": "x"}', "got 'x'"),
        ('{"method": "foo"}', "unknown reduction method 'foo'"),
        ('{"method": "divprune", "options": {"foo": 1}}', "divprune has no option foo"),
        ('{"options": [1]}', "give a mapping"),
        ('{"policy": {"schedule": {"a": 1}}}', "whole numbers from 0"),
    ],
)
def test_a_plan_that_could_not_be_followed_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        Plan.from_json(text)


def test_g_search_gives_no_plan_where_not_even_the_largest_share_holds():
    with pytest.raises(ValueError, match="within the bound, the best value is 9"):
        fit_g_search(lambda plan: 9.0, [2, 4], 0.1, [0.25, 0.5])
    with pytest.raises(ValueError, match="one or more of both"):
        fit_g_search(lambda plan: 0.0, [2, 4], 0.1, [])

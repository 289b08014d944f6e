"""The published searches as `Search`es, and one call for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from token_reduction.fit.bayes import Bayes
from token_reduction.fit.plan import Fitted, Plan, fit
from token_reduction.inside.policies import psigmoid, vflowopt, vtw
from token_reduction.inside.policy import Scheduled

Objective = Callable[[Plan], float]


class FirstWithin:
    """Plans in order; the first whose value is at most `bound`."""

    def __init__(self, plans: Iterable[Plan], bound: float) -> None:
        self.plans, self.bound = iter(plans), bound
        self.found: Plan | None = None

    def ask(self) -> Plan | None:
        """The next plan, None once one is within the bound."""
        return None if self.found else next(self.plans, None)

    def tell(self, plan: Plan, value: float) -> None:
        """Learn a value."""
        if value <= self.bound:
            self.found = plan

    def best(self) -> Plan | None:
        """The first plan within the bound."""
        return self.found


class LayerByLayer:
    """From shallow to deep the smallest share whose value stays within the bound, never more than the layer before.

    Shares are tried by bisection over `choices`: the value is taken to grow as a layer keeps less.
    """

    def __init__(self, layers: Sequence[int], choices: Sequence[float], bound: float, scorer: str) -> None:
        self.layers, self.bound, self.scorer = list(layers), bound, scorer
        self.choices = sorted(set(choices))
        if not self.choices or not self.layers:
            raise ValueError(f"got layers {self.layers} and choices {self.choices}; give one or more of both")
        self.holds = False
        self.fixed: dict[int, float] = {}
        self.plan: Plan | None = None
        self._open(len(self.choices) - 1)

    def _open(self, last: int) -> None:
        self.low, self.high = 0, last  # the share of the layer before is known to hold

    def ask(self) -> Plan | None:
        """The middle of what is open in the shallowest layer that is not fixed."""
        while len(self.fixed) < len(self.layers):
            if self.low < self.high:
                share = self.choices[(self.low + self.high) // 2]
                return self._with({self.layers[len(self.fixed)]: share})
            self.fixed[self.layers[len(self.fixed)]] = self.choices[self.high]
            self._open(self.high)
        if self.plan is None or self.plan != self._with({}):
            self.plan = self._with({})
            return self.plan
        return None

    def tell(self, plan: Plan, value: float) -> None:
        """Learn a value: halve what is open."""
        if len(self.fixed) == len(self.layers):
            self.holds = value <= self.bound
            return
        middle = (self.low + self.high) // 2
        if value <= self.bound:
            self.high = middle
        else:
            self.low = middle + 1

    def best(self) -> Plan | None:
        """The plan of all layers, where it is within the bound."""
        return self.plan if self.holds else None

    def _with(self, more: dict[int, float]) -> Plan:
        return Plan(policy=Scheduled(name="g_search", schedule={**self.fixed, **more}, scorer=self.scorer))


def fit_withdrawal(objective: Objective, layers: Iterable[int], eta: float) -> Fitted:
    """VTW: the first layer K whose withdrawal costs at most `eta` (a `divergence`; .003 to .0001 in the paper, K from 5)."""
    return fit(FirstWithin((Plan(policy=vtw(layer)) for layer in layers), eta), objective)


def fit_g_search(
    objective: Objective, layers: Sequence[int], bound: float, choices: Sequence[float], scorer: str = "last_row"
) -> Fitted:
    """G-Search: the smallest share of each layer, shallow to deep, that keeps the value within `bound`.

    choices: shares to choose from; the largest is taken to hold everywhere, and where it does not there is no plan.
    """
    return fit(LayerByLayer(layers, choices, bound, scorer), objective)


def fit_p_sigmoid(
    objective: Objective,
    layers: int,
    budget: float,
    *,
    calls: int = 40,
    starts: int = 10,
    scorer: str = "last_row",
    seed: int = 0,
) -> Fitted:
    """P-Sigmoid: steepness and floor by Bayesian optimisation; the centre is what makes the mean share equal `budget`."""

    def make(numbers: list[float]) -> Plan | None:
        steepness, floor = numbers
        low, high = -2.0 * layers, 3.0 * layers
        for _ in range(60):
            centre = (low + high) / 2
            plan = Plan(policy=psigmoid(layers, steepness, centre, floor, scorer))
            low, high = (centre, high) if plan.cost(layers) < budget else (low, centre)
        return plan if abs(plan.cost(layers) - budget) < 1e-3 else None

    if not 0 < budget < 1:
        raise ValueError(f"a budget is a mean share in 0..1, got {budget!r}")
    return fit(Bayes([(0.05, 5.0), (0.0, budget)], make, calls=calls, starts=starts, seed=seed), objective)


def fit_vflowopt(
    objective: Objective,
    budget: float,
    *,
    layers: int = 28,
    stages: tuple[int, int] = (9, 18),
    box: Sequence[tuple[float, float]] = ((0.25, 0.375), (0.533, 1.0), (0.0, 50.0), (3.0, 24.0), (-1.0, 1.0)),
    calls: int = 300,
    starts: int = 27,
    seed: int = 0,
) -> Fitted:
    """VFlowOpt: encoder share r, first decoder share r1, t, m and alpha_v in a box; the second decoder share is solved so that
    the mean share over layers is `budget`. The default box is the published one for a quarter of the tokens."""

    def make(numbers: list[float]) -> Plan | None:
        r, first, t, m, alpha = numbers
        a, b = stages
        second = (budget * layers / r - a - first * (b - a)) / (first * (layers - b))
        if not 0 <= second <= 1:
            return None
        options = {"t": t, "m": m, "alpha_v": alpha}
        return Plan(policy=vflowopt(first, second, stages), method="vflowopt", options=options, ratio=r)

    return fit(Bayes(box, make, calls=calls, starts=starts, seed=seed), objective)

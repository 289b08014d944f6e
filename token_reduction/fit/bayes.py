"""Bayesian optimisation in a box: a Gaussian process over what was tried, the next point where it expects most.

    k(x, y) = (1 + r + r^2/3) exp(-r),  r = sqrt(5) |x - y| / l      (Matern 5/2), x scaled to the unit cube
    next    = arg-max over drawn points of the expected improvement on the best value

The length l is, of a few, the one that makes what was seen most likely.
Source: Snoek, Larochelle, Adams, "Practical Bayesian optimization of machine learning algorithms", NeurIPS 2012.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from token_reduction.fit.plan import Plan

_LENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6)
_NOISE = 1e-6


class Bayes:
    """`Search` over a box.

    Args:
        box: (low, high) of each number. make: numbers -> plan, or None where there is no plan (the point is passed over).
        calls: plans to try. starts: of them drawn at random before the process is used. drawn: points compared for the next.
        seed: of the drawing.
    """

    def __init__(
        self,
        box: Sequence[tuple[float, float]],
        make: Callable[[list[float]], Plan | None],
        *,
        calls: int = 300,
        starts: int = 27,
        drawn: int = 512,
        seed: int = 0,
    ) -> None:
        if not box or any(not low < high for low, high in box):
            raise ValueError(f"a box has low < high for each number, got {list(box)}")
        if not 1 <= starts <= calls:
            raise ValueError(f"calls >= starts >= 1, got {calls} calls and {starts} starts")
        low, high = torch.tensor(box, dtype=torch.float64).T
        self.low, self.width = low, high - low
        self.make, self.calls, self.starts, self.drawn = make, calls, starts, drawn
        self.chance = torch.Generator().manual_seed(seed)
        self.points: list[Tensor] = []
        self.values: list[float] = []
        self.plans: list[Plan] = []
        self._asked: Tensor | None = None

    def ask(self) -> Plan | None:
        """A drawn point at first, then the one with the most expected improvement among those that have a plan."""
        if len(self.values) >= self.calls:
            return None
        cloud = torch.rand(self.drawn, len(self.low), generator=self.chance, dtype=torch.float64)
        order = range(self.drawn) if len(self.values) < self.starts else self._promising(cloud)
        for i in order:
            plan = self.make((self.low + cloud[i] * self.width).tolist())
            if plan is not None:
                self._asked = cloud[i]
                return plan
        raise ValueError(f"none of {self.drawn} points in the box has a plan; widen the box or the budget")

    def tell(self, plan: Plan, value: float) -> None:
        """Learn a value."""
        assert self._asked is not None
        self.points.append(self._asked)
        self.plans.append(plan)
        self.values.append(value)

    def best(self) -> Plan | None:
        """The plan with the least value."""
        return self.plans[min(range(len(self.values)), key=self.values.__getitem__)] if self.values else None

    def _promising(self, cloud: Tensor) -> list[int]:
        x, y = torch.stack(self.points), torch.tensor(self.values, dtype=torch.float64)
        spread = float(y.std()) or 1.0
        y = (y - y.mean()) / spread
        length = max(_LENGTHS, key=lambda each: _likelihood(x, y, each))
        factor = _factor(x, length)
        across = _matern(cloud, x, length)
        mean = across @ torch.cholesky_solve(y[:, None], factor)[:, 0]
        half = torch.linalg.solve_triangular(factor, across.T, upper=False)
        deviation = (1 - half.square().sum(0)).clamp_min(1e-12).sqrt()
        gain = float(y.min()) - mean
        z = gain / deviation
        density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        expected = gain * torch.special.ndtr(z) + deviation * density
        return expected.argsort(descending=True, stable=True).tolist()


def _matern(a: Tensor, b: Tensor, length: float) -> Tensor:
    r = math.sqrt(5) * torch.cdist(a, b) / length
    return (1 + r + r * r / 3) * torch.exp(-r)


def _factor(x: Tensor, length: float) -> Tensor:
    return torch.linalg.cholesky(_matern(x, x, length) + _NOISE * torch.eye(len(x), dtype=x.dtype))


def _likelihood(x: Tensor, y: Tensor, length: float) -> float:
    factor = _factor(x, length)
    fit = y @ torch.cholesky_solve(y[:, None], factor)[:, 0]
    return float(-0.5 * fit - factor.diagonal().log().sum())

"""A plan is what a fit leaves: how to reduce before the model, and the schedule inside it. JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from token_reduction.budget import Budget
from token_reduction.inside.policy import Scheduled
from token_reduction.registry import build


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A frozen choice.

    Args:
        policy: the schedule inside the model.
        method, options, ratio: the reducer before it, for `build(method, **options)` and `Budget.ratio(ratio)`.

    Raises: ValueError for a method, options or a ratio that these would refuse.

    >>> plan = Plan(policy=Scheduled(schedule={3: 0.5}), method="vflowopt", options={"t": 30.0}, ratio=0.25)
    >>> Plan.from_json(plan.to_json()) == plan, plan.cost(8)
    (True, 0.1875)
    """

    policy: Scheduled = field(default_factory=Scheduled)
    method: str = "identity"
    options: Mapping[str, Any] = field(default_factory=dict)
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Scheduled):
            raise ValueError(f"policy is {self.policy!r}; give a Scheduled")
        Budget.ratio(self.ratio)
        if not isinstance(self.options, Mapping):
            raise ValueError(f"options are {self.options!r}; give a mapping of names to values")
        build(self.method, **self.options)

    def cost(self, layers: int) -> float:
        """Mean over layers of the share of the picture's tokens that a layer computes."""
        return self.ratio * self.policy.mean_share(layers)

    def to_json(self) -> str:
        """The plan as text."""
        whole = {"method": self.method, "options": dict(self.options), "ratio": self.ratio}
        return json.dumps({**whole, "policy": json.loads(self.policy.to_json())}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from `to_json`.

        Raises: ValueError for text that is no plan.
        """
        try:
            whole = json.loads(text)
            return cls(**{**whole, "policy": Scheduled.from_json(json.dumps(whole.get("policy", {})))})
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no plan: {error}; plans come from Plan.to_json") from None


class Search(Protocol):
    """Proposes plans and learns what they are worth; smaller values are better."""

    def ask(self) -> Plan | None:
        """The next plan to try, or None when done."""
        ...

    def tell(self, plan: Plan, value: float) -> None:
        """What the plan that was asked for is worth."""
        ...

    def best(self) -> Plan | None:
        """The frozen plan, or None where nothing that was tried will do."""
        ...


@dataclass(frozen=True)
class Fitted:
    """The plan that was found, its value, and everything that was tried, in order."""

    plan: Plan
    value: float
    tried: tuple[tuple[Plan, float], ...]


def fit(
    search: Search, objective: Callable[[Plan], float], progress: Callable[[int, Plan, float], None] | None = None
) -> Fitted:
    """Ask, try, tell, until the search is done.

    Args:
        objective: runs the model with a plan and says how much is lost (`divergence`, 1 - `agreement`, a loss); finite.

    Raises: ValueError where no plan will do, with the best value seen.
    """
    tried: list[tuple[Plan, float]] = []
    while (plan := search.ask()) is not None:
        value = float(objective(plan))
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"the objective gave {value} for {plan}; it must be a finite number")
        tried.append((plan, value))
        search.tell(plan, value)
        if progress:
            progress(len(tried), plan, value)
    found = search.best()
    if found is None:
        least = min((value for _, value in tried), default=None)
        raise ValueError(f"none of {len(tried)} plans is within the bound, the best value is {least}; raise the bound")
    return Fitted(found, next(value for plan, value in tried if plan == found), tuple(tried))


def divergence(full: Tensor, reduced: Tensor) -> float:
    """KL(full || reduced) of last-token logits (samples, vocabulary), mean over samples: VTW's objective.

    >>> divergence(torch.zeros(2, 3), torch.zeros(2, 3))
    0.0
    """
    p, q = torch.log_softmax(full.double(), -1), torch.log_softmax(reduced.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def agreement(full: Tensor, reduced: Tensor) -> float:
    """Mean cosine of last-layer, last-token states (samples, D): VFlowOpt's objective is 1 minus this."""
    return float(torch.nn.functional.cosine_similarity(full.double(), reduced.double(), dim=-1).mean())

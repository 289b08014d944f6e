"""A layer policy: after which layers how many visual rows go on, chosen by what, and what becomes of the others.

    schedule   {layer: share of the prompt's visual rows that stay after it}       a frozen plan, JSON both ways
    scorer     a function of the layer's `View` (`scorers.py`)
    action     prune: the others leave.   merge: they join kept rows.   A share of 0 drops every visual row.

Rows that leave keep their keys and values in the layers they went through, and the others keep their positions, so decoding
goes on as if the gone rows had been masked as keys in later layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from token_reduction.exact import top
from token_reduction.inside.scorers import SCORERS
from token_reduction.inside.view import Decision, View, drop_all


@dataclass(frozen=True, kw_only=True)
class LayerPolicy:
    """Base: nothing leaves. A subclass answers `after`, and may ask for another form of attention (`forms.py`)."""

    name: str = "none"

    @property
    def acts_after(self) -> tuple[int, ...]:
        """Layers after which the policy acts, as far as it knows them beforehand; a model has to have them."""
        return ()

    def after(self, view: View) -> Decision | None:
        """What to do after a layer; None: go on as before."""
        return None


@dataclass(frozen=True, kw_only=True)
class Scheduled(LayerPolicy):
    """Keep the best-scored share of visual rows after given layers.

    Args:
        schedule: layer (from 0) -> share in 0..1 of the prompt's visual rows, or a whole number above 1 of rows.
        scorer: a name of `SCORERS`.
        recycle: share of the rows that leave which are merged into the kept ones; the best-scored of them, each into the kept
            row with the nearest hidden state. 0 prunes.

    >>> policy = Scheduled(schedule={2: 0.5, 5: 0.0}, scorer="last_row")
    >>> Scheduled.from_json(policy.to_json()) == policy, policy.mean_share(8)
    (True, 0.5625)
    """

    schedule: Mapping[int, float] = field(default_factory=dict)
    scorer: str = "last_row"
    recycle: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Mapping):
            raise ValueError(f"a schedule maps layers to shares, got {self.schedule!r}")
        object.__setattr__(self, "schedule", {_layer(n): _share(n, s) for n, s in self.schedule.items()})
        if self.scorer not in SCORERS:
            raise ValueError(f"unknown scorer {self.scorer!r}; scorers are {', '.join(SCORERS)}")
        if not (isinstance(self.recycle, Real) and 0 <= self.recycle <= 1):
            raise ValueError(f"recycle is a share in 0..1, got {self.recycle!r}")

    def __hash__(self) -> int:
        return hash(self.to_json())

    @property
    def acts_after(self) -> tuple[int, ...]:
        return tuple(self.schedule)

    def rows(self, layer: int, total: int) -> int:
        """How many of `total` visual rows go on after a layer of the schedule."""
        share = self.schedule[layer]
        return min(total, int(share) if share > 1 else round(share * total))

    def mean_share(self, layers: int, total: int = 10**6) -> float:
        """Mean over layers of the share of visual rows that a layer computes: the plan's cost."""
        alive, sums = total, 0
        for layer in range(layers):
            sums += alive
            if layer in self.schedule:
                alive = min(alive, self.rows(layer, total))
        return sums / (layers * total)

    def after(self, view: View) -> Decision | None:
        if view.layer not in self.schedule:
            return None
        count = min(self.rows(view.layer, view.total), len(view.visual))
        if count == len(view.visual):
            return None
        if count == 0:
            return drop_all(view)
        score = self.score(view)
        keep = top(score, count).sort().values
        return Decision(keep, _recycled(view, score, keep, self.recycle) if self.recycle else None)

    def score(self, view: View) -> Tensor:
        """(v,) of the alive visual rows."""
        return SCORERS[self.scorer](view)

    def to_json(self) -> str:
        """The frozen plan as text."""
        return json.dumps({**asdict(self), "schedule": dict(sorted(self.schedule.items()))}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Scheduled:
        """A plan from `to_json`.

        Raises: ValueError for text that is no plan of this class.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no plan of {cls.__name__}: {error}") from None


def _layer(number: Any) -> int:
    """A layer's number; JSON writes it as text."""
    whole = int(number) if isinstance(number, str) and number.isdecimal() else number
    if not isinstance(whole, int) or isinstance(whole, bool) or whole < 0:
        raise ValueError(f"a schedule acts after layers, whole numbers from 0, got {number!r}")
    return whole


def _share(layer: Any, share: Any) -> float:
    known = isinstance(share, Real) and not isinstance(share, bool)
    if not known or not (0 <= share <= 1 or (share > 1 and share == int(share))):
        raise ValueError(
            f"a schedule keeps a share in 0..1 or a whole number of rows above 1, got {share!r} for layer {layer}"
        )
    return share


def _recycled(view: View, score: Tensor, keep: Tensor, share: float) -> Tensor:
    """(m, v) means: the best of the leaving rows join the kept row with the nearest hidden state."""
    hidden = torch.nn.functional.normalize(view.hidden[view.visual].double(), dim=1)
    matrix = hidden.new_zeros(len(keep), len(hidden))
    matrix[torch.arange(len(keep)), keep] = 1.0
    left = score.clone()
    left[keep] = -torch.inf
    gone = top(left, round(share * (len(score) - len(keep))))
    matrix[(hidden[gone] @ hidden[keep].mT).argmax(1), gone] = 1.0
    return matrix / matrix.sum(1, keepdim=True)

"""What a call over ranks did, beside what `Stats` says on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sparse_attn.geometry import Geometry
from sparse_attn.stats import Stats
from tokenring import Plan


@dataclass
class RankStats(Stats):
    """`density`, `stripe_density`, `imbalance` and `wanted` are of all ranks together; the rest is this rank's. Where plain
    attention ran, its plan says who sends what, and `imbalance` and `wanted` are not counted (1 and 0).

    `plan` holds this rank's columns as positions of the sequence, a group for each part of its rows.
    """

    plans: list[Plan] = field(default_factory=list)
    """The exchanges of the forward pass, in order: `bytes_sent` is the sum of theirs."""
    backward_plans: list[Plan] = field(default_factory=list)
    """Those of the backward pass, once it has run."""
    ring_bytes: int = 0
    """What this rank would send in a dense ring that passes every block all the way round."""
    wanted: float = 0.0
    """Rows of keys that ranks wanted of one another, anchor regions included / all rows of others; counted by key head."""

    def of_ranks(self, each: Sequence[Sequence[float]], heads: int, geometry: Geometry) -> None:
        """From every rank's pairs, columns, wanted rows and rows of others; `heads` are batch entries * query heads."""
        pairs, columns, wanted, others = (list(x) for x in zip(*each))
        self.density = sum(pairs) / max(1, geometry.causal_pairs * heads)
        self.stripe_density = sum(columns) / heads / max(1.0, geometry.causal_pairs / geometry.rows)
        self.imbalance = max(pairs) * len(pairs) / max(1.0, sum(pairs))
        self.wanted = sum(wanted) / max(1.0, sum(others))

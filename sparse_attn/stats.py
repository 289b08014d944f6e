"""What a call did: which path ran, how many pairs it computed, and where its time went."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from sparse_attn.stripes import StripePlan


class _Timed:
    """A context in a class: one made of a generator takes several times as long to enter, which short calls feel."""

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self.seconds, self.phase = seconds, phase

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *raised: object) -> None:
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + time.perf_counter() - self.start


@dataclass
class Stats:
    """Filled by one call of `anchor_attention`."""

    path: str = "sparse"
    """"sparse", or "dense" where plain attention ran."""
    why: str = ""
    """What decided the path."""
    density: float = 1.0
    """Computed pairs / causal pairs, anchor region included; over all ranks' rows where there are several."""
    stripe_density: float = 0.0
    """The paper's ratio: kept columns / (N^2 / 2G), without the anchor region."""
    seconds: dict[str, float] = field(default_factory=dict)
    """"anchor", "identify" and "stripes", or "dense"; measured on this rank, of work handed to the device."""
    bytes_sent: int = 0
    """Payload bytes that left this rank."""
    imbalance: float = 1.0
    """Pairs of the busiest rank / mean over the ranks."""
    plan: StripePlan | None = None
    """The columns that were used."""
    theta: float | tuple[float, ...] | None = None
    """Of a model's layer (`sparse_attn.integrations`): the theta, or one for each head, that was asked for."""

    def of_plan(self, plan: StripePlan) -> None:
        """Take path and densities from a plan."""
        self.plan, self.path, self.why = plan, plan.path, plan.why
        self.density, self.stripe_density = plan.density, plan.stripe_density

    def timed(self, phase: str) -> _Timed:
        """A context that adds its wall-clock time to a phase."""
        return _Timed(self.seconds, phase)

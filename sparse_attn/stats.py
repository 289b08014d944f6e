"""What a call did: which path ran, how many pairs it computed, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sparse_attn.stripes import StripePlan


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

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the block's wall-clock time to a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

"""What the experts of every model have in common in a run: sizes, groups, and what a report wants of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from moe.dispatch import Dispatcher


@dataclass(frozen=True, kw_only=True)
class ExpertBlock:
    """What every layer of experts of a run has in common."""

    experts: int
    """E, over all ranks."""
    topk: int
    """k."""
    ep_group: Any = None
    """Ranks that the experts are spread over; None: this rank alone."""
    etp_group: Any = None
    """Ranks that hold parts of the same experts; None: this rank alone."""
    dispatcher: str = "auto"
    """A name of `moe.build_dispatcher`."""
    ranks_per_node: int | None = None
    """As there."""
    topology: Any = None
    """As there: links between the ranks of the EP x ETP block, for "auto"."""
    chunks: int = 1
    """As in `moe.MoELayer`."""
    seed: int = 0
    """Of routers that are drawn."""


class ExpertLayer(Protocol):
    """One layer's experts, of which this rank holds its own."""

    prefill_tokens: Tensor
    """(E_local,) int64: tokens that came to each expert held here in the first pass, the prefill."""

    @property
    def sender(self) -> Dispatcher:
        """What was built for the layer."""

    @property
    def dispatcher(self) -> Dispatcher:
        """The dispatcher at work; what "auto" chose once the first tokens were sent."""


def at_work(sender: Dispatcher) -> Dispatcher:
    """The dispatcher that "auto" became, or the one given."""
    return getattr(sender, "chosen", None) or sender

"""The demo model with experts: each feed-forward network of its language model upcycled to E copies behind a random router."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from launch.models import upcycled
from launch.models.demo import DemoAdapter
from launch.models.upcycled import ExpertBlock, SpreadLayer

NOTE = (
    "The experts of demo-moe are copies of the demo's own networks behind routers drawn at random: where tokens go means "
    "nothing, what their way costs (bytes, times, balance under such routers) is real."
)


class DemoMoeAdapter(DemoAdapter):
    """See launch.models.base.Adapter for the methods. Dense until `spread_experts`."""

    name = "demo-moe"
    notes = (*DemoAdapter.notes, NOTE)

    def __init__(self, encoder: Any, model: Any, tokenizer: Any) -> None:
        super().__init__(encoder, model, tokenizer)
        self.layers: list[SpreadLayer] = []

    def alone(self) -> AbstractContextManager[None]:
        """See Adapter."""
        return upcycled.alone(self.layers)

    def spread_experts(self, block: ExpertBlock, keep_dense: bool) -> list[SpreadLayer]:
        """See Adapter."""
        self.layers = upcycled.upcycle(self.text_model, block, keep_dense)
        return self.layers

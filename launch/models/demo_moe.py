"""The demo model with experts: each feed-forward network of its language model upcycled to E copies behind a random router."""

from __future__ import annotations

from contextlib import AbstractContextManager

from launch.models import upcycled
from launch.models.demo import DemoAdapter
from launch.models.expert_block import ExpertBlock
from launch.models.upcycled import SpreadLayer

NOTE = (
    "The experts of demo-moe are copies of the demo's own networks behind routers drawn at random: where tokens go means "
    "nothing, what their way costs (bytes, times, balance under such routers) is real."
)


class DemoMoeAdapter(DemoAdapter):
    """See launch.models.base.Adapter for the methods. Dense until `spread_experts`."""

    name = "demo-moe"
    notes = (*DemoAdapter.notes, NOTE)

    def alone(self) -> AbstractContextManager[None]:
        """See Adapter."""
        return upcycled.alone(self.layers)

    def spread_experts(self, block: ExpertBlock, keep_whole: bool) -> list[SpreadLayer]:
        """See Adapter."""
        self.layers = upcycled.upcycle(self.text_model, block, keep_whole)
        return self.layers

"""Every token goes to every rank; each rank uses those its experts want. Fewest messages; fewest bytes where k nears the ranks."""

from __future__ import annotations

from moe.dispatch.base import Dispatcher
from moe.dispatch.hop import Stage


class AllGather(Dispatcher):
    """Rows per token that leave a rank: R ETP - 1."""

    name = "allgather"

    def stages(self) -> list[Stage]:
        """Over the EP group, then over the ETP group."""
        return self._over_ep("all") + self._over_etp()

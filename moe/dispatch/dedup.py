"""A token goes once to each rank that holds experts it wants; there its weighted outputs are added up and return as one row."""

from __future__ import annotations

from moe.dispatch.base import Dispatcher
from moe.dispatch.hop import Stage


class Dedup(Dispatcher):
    """Rows per token that leave a rank: (R - 1) p over EP, (ETP - 1) R p over ETP, p = 1 - C(E - e, k) / C(E, k)."""

    name = "dedup"

    def stages(self) -> list[Stage]:
        """Tokens once over the EP group, once over the ETP group."""
        return self._over_ep("unique") + self._over_etp()

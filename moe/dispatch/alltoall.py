"""A copy of a token goes to each of its k experts: the order most libraries use, and the baseline here.

With ETP the copies, not the tokens, are gathered by the ranks that share an expert; that is what makes ETP dear elsewhere.
"""

from __future__ import annotations

from moe.dispatch.base import Dispatcher
from moe.dispatch.hop import Stage


class AllToAll(Dispatcher):
    """Rows per token that leave a rank: k (R - 1) / R over EP, (ETP - 1) k over ETP."""

    name = "alltoall"

    def stages(self) -> list[Stage]:
        """Copies over the EP group, all of them over the ETP group."""
        return self._over_ep("copies") + self._over_etp()

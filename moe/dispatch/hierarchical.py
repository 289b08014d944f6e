"""A token crosses to each node that wants it once, to the rank of the same place there, which passes it on inside the node.

Sums are taken in the node as well, so one row comes back from each node. (The two steps of DeepEP's normal mode and of
HierMoE, arXiv 2508.09591, here on plain point-to-point messages.)
"""

from __future__ import annotations

from typing import Any

from moe.dispatch.base import Dispatcher
from moe.dispatch.hop import Stage


class Hierarchical(Dispatcher):
    """Rows per token that leave a node: (N - 1) p_n, p_n = 1 - C(E - E / N, k) / C(E, k) for N nodes.

    Args:
        ranks_per_node: consecutive ranks of the EP x ETP block (ETP fastest) that share a node; None: one node.
    """

    name = "hierarchical"

    def __init__(self, *, ranks_per_node: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        block = self.ep.world * self.etp.world
        per_node = block if ranks_per_node is None else ranks_per_node
        if per_node < 1 or block % per_node or per_node % self.etp.world:
            raise ValueError(
                f"ranks_per_node={per_node} does not cut EP x ETP = {self.ep.world} x {self.etp.world} ranks into equal nodes "
                f"of whole ETP groups; give a multiple of {self.etp.world} that divides {block}"
            )
        self.ep_per_node = per_node // self.etp.world

    def stages(self) -> list[Stage]:
        """Between nodes, inside a node, over the ETP group."""
        size, here = self.ep_per_node, self.ep.rank
        nodes = self.ep.world // size
        if nodes == 1 or size == 1:
            return self._over_ep("unique") + self._over_etp()
        node, place = divmod(here, size)
        rail = tuple(range(place, self.ep.world, size))
        inside = tuple(range(node * size, (node + 1) * size))
        return [
            Stage(self.ep, rail, "unique", 0, size * self.local_experts),
            Stage(self.ep, inside, "unique", node * size * self.local_experts, self.local_experts),
            *self._over_etp(),
        ]

"""The dispatcher that is expected to be done first, chosen once by the byte model, the links, and what copies cost.

    seconds = 2 links(rows sent) + rows copied / memory rate      there and back; the busiest rank's copies

Rows are copied where they are picked for a peer and where sums that come back are added; `allgather` sends its rows as they lie,
and so picks none. Over fast links, or processors that many ranks share, that outweighs the bytes it sends more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe.dispatch.allgather import AllGather
from moe.dispatch.base import Dispatcher
from moe.dispatch.dedup import Dedup
from moe.dispatch.flow import Route
from moe.dispatch.hierarchical import Hierarchical
from moe.dispatch.hop import Stage
from moe.traffic import traffic
from tokenring.topology import BYTES_PER_GB, Topology

NOMINAL_TOKENS = 1024
INSIDE_GBYTES_PER_S, BETWEEN_GBYTES_PER_S = 450.0, 50.0
"""Rates where no topology is given: a port of NVLink 4 in one direction, a 400 Gb/s network port of each rank."""


class Auto(Dispatcher):
    """Becomes one of the others at its first dispatch, when k and the size of a row are known; `chosen` says which.

    Copies per expert never win: they send no fewer rows than `dedup` over any link. All ranks choose alike, from what they all know.

    Args:
        topology: a `tokenring.topology.Topology` of the EP x ETP block; None: the rates above. Copies count where it knows
            `costs.merge_gbytes_per_s`, as one that `Topology.probe` measured does.
        ranks_per_node: as in `Hierarchical`; None: one node.
    """

    name = "auto"

    def __init__(self, *, ranks_per_node: int | None = None, topology: Topology | None = None, **options: Any) -> None:
        super().__init__(**options)
        block = self.ep.world * self.etp.world
        if topology is not None and topology.world != block:
            raise ValueError(
                f"topology has {topology.world} ranks; give one of the EP x ETP block, {self.ep.world} x {self.etp.world}"
            )
        if ranks_per_node is None and topology is not None and topology.intra is not None:
            ranks_per_node = topology.intra.world
        self._options, self._per_node = options, ranks_per_node
        self._topology = topology or default_topology(block, ranks_per_node)
        self._hierarchical = Hierarchical(ranks_per_node=ranks_per_node, **options)
        self.chosen: Dispatcher | None = None
        self.seconds: dict[str, float] = {}
        """Modelled seconds of one dispatch of 1,024 tokens a rank and its combine, by name, once chosen; what all dispatchers have
        in common (rows into the experts' order and back) is left out."""

    def stages(self) -> list[Stage]:
        """Those of the chosen dispatcher."""
        assert self.chosen is not None
        return self.chosen.stages()

    def plan(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Route, Tensor, Tensor, Tensor]:
        """As all dispatchers; the first call agrees on one."""
        if self.chosen is None:
            self._choose(hidden, ids, weights)
        return super().plan(hidden, ids, weights)

    def _choose(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        bad = self._refusal(hidden, ids, weights) is not None
        sizes = [0, 0] if bad else [ids.shape[1], hidden.shape[1] * hidden.element_size()]
        said = torch.tensor([sizes], device=self.ep.device)
        for transport in (self.ep, self.etp):
            said = torch.cat(transport.all_gather(said, same_shape=True, control=True))
        known = sorted({tuple(row) for row in said.tolist() if row[0]})
        # where ranks disagree any choice will do: what follows refuses on all of them
        topk, row_bytes = known[0] if known else (1, 1)
        candidates = {"dedup": Dedup(**self._options), "allgather": AllGather(**self._options)}
        if 1 < self._hierarchical.ep_per_node < self.ep.world:
            candidates["hierarchical"] = self._hierarchical
        self.seconds = {name: self._modelled(name, topk, row_bytes) for name in candidates}
        chosen = candidates[min(self.seconds, key=self.seconds.__getitem__)]
        self.chosen = chosen if len(known) == 1 and not bool((said[:, 0] == 0).any()) else None
        if self.chosen is None:
            candidates["dedup"].plan(hidden, ids, weights)  # says on all ranks what is wrong
            raise AssertionError("ranks that disagree were not refused")

    def _modelled(self, name: str, topk: int, row_bytes: int) -> float:
        sizes = {"num_experts": self.num_experts, "topk": topk, "ep": self.ep.world, "etp": self.etp.world}
        per_node = self._hierarchical.ep_per_node * self.etp.world
        sent = traffic(name, **sizes, tokens=NOMINAL_TOKENS, row_bytes=row_bytes, ranks_per_node=per_node)
        parts = [sent]
        if name == "hierarchical":  # a row goes on inside the node once it has arrived there
            across = {pair: size for pair, size in sent.items() if pair[0] // per_node != pair[1] // per_node}
            parts = [across, {pair: size for pair, size in sent.items() if pair not in across}]
        links = sum(self._topology.seconds((a, b, size) for (a, b), size in part.items()) for part in parts)
        return 2 * links + self._copying(sent, picks=name != "allgather")

    def _copying(self, sent: Mapping[tuple[int, int], float], *, picks: bool) -> float:
        """Seconds that the busiest rank copies rows it sends and adds those that come back for them."""
        costs, etp = self._topology.costs, self.etp.world
        if costs is None or costs.merge_gbytes_per_s is None:
            return 0.0
        copied = [0.0] * (self.ep.world * etp)
        for (a, b), size in sent.items():
            over_ep = a // etp != b // etp  # over the ETP group rows go whole
            copied[a] += size * (2 if picks and over_ep else 1)
        return max(copied) / (BYTES_PER_GB * costs.merge_gbytes_per_s)


def default_topology(block: int, ranks_per_node: int | None) -> Topology:
    """Links assumed where none are given."""
    note = "assumed rates, not measured"
    if ranks_per_node is None or ranks_per_node >= block:
        return Topology.switch(block, INSIDE_GBYTES_PER_S, note=note)
    return Topology.nodes(
        block // ranks_per_node,
        ranks_per_node,
        intra=INSIDE_GBYTES_PER_S,
        inter=BETWEEN_GBYTES_PER_S,
        nic_per="rank",
        note=note,
    )

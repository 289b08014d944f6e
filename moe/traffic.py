"""How many bytes a dispatcher sends from where to where: expected under uniform routing, exact for a given one.

E experts in equal parts on R = EP ranks (e each), each cut in ETP; k different experts a token; T tokens a rank; N nodes.
A token wants a given rank with p = 1 - C(E - e, k) / C(E, k), a given node with p_n = 1 - C(E - E / N, k) / C(E, k).

    rows a token sends       over EP                               over ETP, all ranks of the EP group together
    allgather                R - 1                                 R (ETP - 1)
    alltoall                 k (R - 1) / R                         k (ETP - 1)
    dedup                    (R - 1) p                             R p (ETP - 1)
    hierarchical             (N - 1) p_n between nodes, R p (g - 1) / g inside one of g ranks, ETP as dedup

Combine sends the same rows back; each half of the backward pass repeats what its forward half sent.
Ranks are places in the EP x ETP block, ETP fastest. Metadata (ids, weights, entries of each row, notes) stands apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import comb

import torch
from torch import Tensor

from moe.dispatch.wire import NOTE_BYTES, metadata_bytes

Bytes = dict[tuple[int, int], float]
NAMES = ("allgather", "alltoall", "dedup", "hierarchical")


def wanted(num_experts: int, topk: int, part: int) -> float:
    """Probability that a token wants a part of `part` experts, its k drawn evenly without replacement.

    >>> round(wanted(64, 8, 16), 4)
    0.9147
    """
    return 1 - comb(num_experts - part, topk) / comb(num_experts, topk)


def traffic(
    name: str,
    *,
    num_experts: int,
    topk: int,
    ep: int,
    etp: int = 1,
    tokens: int | Sequence[int],
    row_bytes: int,
    ranks_per_node: int | None = None,
    routing: Sequence[Tensor] | None = None,
    direction: str = "dispatch",
    metadata: bool = False,
    weight_bytes: int = 4,
) -> Bytes:
    """Bytes of one forward dispatch or combine: {(source, destination): bytes}.

    Args:
        name: "allgather", "alltoall", "dedup" or "hierarchical".
        num_experts, topk, ep, etp: E, k, R and ETP.
        tokens: of each rank of the block; one number for all ranks alike.
        row_bytes: of one row of hidden states.
        ranks_per_node: as in `build_dispatcher`; None: one node.
        routing: expert ids (T, k) of each rank of the block, -1 where dropped; None: expected under uniform routing.
        direction: "dispatch" or "combine".
        metadata: the bytes of a dispatch's metadata instead of those of its rows; needs `routing`.
        weight_bytes: of one weight, for metadata.

    >>> traffic("dedup", num_experts=4, topk=2, ep=2, tokens=6, row_bytes=10)[0, 1]
    50.0
    """
    _check(name, num_experts, topk, ep, etp, ranks_per_node, direction, metadata, routing)
    per_node = ep if ranks_per_node is None else max(1, ranks_per_node // etp)
    counts = [tokens] * (ep * etp) if isinstance(tokens, int) else list(tokens)
    if routing is not None:
        counts = [ids.shape[0] for ids in routing]
    if len(counts) != ep * etp:
        raise ValueError(f"tokens or routing is for {len(counts)} ranks; give one for each of EP x ETP = {ep * etp}")
    model = _Exact(num_experts, ep, routing) if routing is not None else _Expected(num_experts, topk, ep, counts)
    price = _Price(row_bytes, metadata, topk, weight_bytes)
    sent: Bytes = {}
    for etp_rank in range(etp):
        column = _Column(name, model, price, ep, etp, etp_rank, per_node, num_experts // ep, counts)
        for source, destination, size in column.messages():
            pair = (source, destination) if direction == "dispatch" else (destination, source)
            if size:
                sent[pair] = sent.get(pair, 0) + size
    return sent


def by_link(sent: Bytes, ranks_per_node: int) -> dict[str, float]:
    """Bytes inside nodes and between them.

    >>> by_link({(0, 1): 5, (0, 2): 7}, ranks_per_node=2)
    {'inside': 5, 'between': 7}
    """
    sizes = {"inside": 0, "between": 0}
    for (source, destination), size in sent.items():
        sizes["inside" if source // ranks_per_node == destination // ranks_per_node else "between"] += size
    return sizes


class _Expected:
    """Expected rows under uniform routing; entries are not modelled."""

    def __init__(self, num_experts: int, topk: int, ep: int, counts: list[int]) -> None:
        self.num_experts, self.topk, self.ep, self.counts = num_experts, topk, ep, counts

    def rows(self, source: int, first: int, ranks: int) -> float:
        """Tokens of a rank of the block that want one of `ranks` neighbouring EP ranks."""
        part = ranks * self.num_experts // self.ep
        return self.counts[source] * wanted(self.num_experts, self.topk, part)

    def entries(self, source: int, first: int, ranks: int) -> float:
        """Choices of a rank's tokens that fall on `ranks` neighbouring EP ranks."""
        return self.counts[source] * self.topk * ranks / self.ep


class _Exact:
    """Counts of a given routing."""

    def __init__(self, num_experts: int, ep: int, routing: Sequence[Tensor]) -> None:
        local = num_experts // ep
        self.rank = [torch.where(ids >= 0, torch.div(ids, local, rounding_mode="floor"), -1) for ids in routing]

    def _hits(self, source: int, first: int, ranks: int) -> Tensor:
        return (self.rank[source] >= first) & (self.rank[source] < first + ranks)

    def rows(self, source: int, first: int, ranks: int) -> int:
        return int(self._hits(source, first, ranks).any(dim=1).sum())

    def entries(self, source: int, first: int, ranks: int) -> int:
        return int(self._hits(source, first, ranks).sum())


@dataclass(frozen=True)
class _Price:
    """Bytes of one message."""

    row_bytes: int
    metadata: bool
    topk: int
    weight_bytes: int

    def __call__(self, rows: float, entries: float, *, width: int, counted: bool) -> float:
        if not self.metadata:
            return rows * self.row_bytes
        sizes = {"width": width, "topk": self.topk, "weight_bytes": self.weight_bytes, "counted": counted}
        return NOTE_BYTES + metadata_bytes(int(rows), int(entries), **sizes)


@dataclass(frozen=True)
class _Column:
    """The ranks of one EP group: those with one place in the ETP groups."""

    name: str
    model: _Exact | _Expected
    price: _Price
    ep: int
    etp: int
    etp_rank: int
    per_node: int
    """EP ranks of one node."""
    local: int
    """Experts of one rank."""
    counts: list[int]

    def messages(self) -> Iterator[tuple[int, int, float]]:
        """(source, destination, bytes), one after the other."""
        if self.name == "hierarchical" and 1 < self.per_node < self.ep:
            yield from self._between_nodes()
            yield from self._inside_nodes()
        else:
            yield from self._over_ep()
        for ep_rank in range(self.ep):
            rows = sum(self._rows(source, ep_rank) for source in range(self.ep))
            entries = sum(self._entries(source, ep_rank) for source in range(self.ep))
            size = self.price(rows, entries, width=self.local, counted=True)
            for other in range(self.etp):
                if other != self.etp_rank:
                    yield self._block(ep_rank), ep_rank * self.etp + other, size

    def _block(self, ep_rank: int) -> int:
        return ep_rank * self.etp + self.etp_rank

    def _entries(self, source: int, first: int, ranks: int = 1) -> float:
        return self.model.entries(self._block(source), first, ranks)

    def _rows(self, source: int, target: int) -> float:
        """Rows that a rank's tokens make at an EP rank."""
        if self.name == "allgather":
            return self.counts[self._block(source)]
        return (
            self._entries(source, target)
            if self.name == "alltoall"
            else self.model.rows(self._block(source), target, 1)
        )

    def _over_ep(self) -> Iterator[tuple[int, int, float]]:
        for source, target in permutations(range(self.ep), 2):
            rows, entries = self._rows(source, target), self._entries(source, target)
            size = self.price(rows, entries, width=self.local, counted=self.name != "alltoall")
            yield self._block(source), self._block(target), size

    def _between_nodes(self) -> Iterator[tuple[int, int, float]]:
        size = self.per_node
        for source, target in permutations(range(self.ep), 2):
            if source % size == target % size:
                first = target - target % size
                rows = self.model.rows(self._block(source), first, size)
                entries = self._entries(source, first, size)
                width = size * self.local
                yield self._block(source), self._block(target), self.price(rows, entries, width=width, counted=True)

    def _inside_nodes(self) -> Iterator[tuple[int, int, float]]:
        size = self.per_node
        for relay, target in permutations(range(self.ep), 2):
            if relay // size == target // size:
                rail = range(relay % size, self.ep, size)
                rows = sum(self._rows(source, target) for source in rail)
                entries = sum(self._entries(source, target) for source in rail)
                yield self._block(relay), self._block(target), self.price(rows, entries, width=self.local, counted=True)


def _check(
    name: str,
    num_experts: int,
    topk: int,
    ep: int,
    etp: int,
    ranks_per_node: int | None,
    direction: str,
    metadata: bool,
    routing: Sequence[Tensor] | None,
) -> None:
    per_node = ep * etp if ranks_per_node is None else ranks_per_node
    fits = per_node >= 1 and (ep * etp) % per_node == 0 == per_node % etp
    rules = (
        (name in NAMES, f"name is {name!r}; give one of {', '.join(NAMES)}"),
        (ep >= 1 and etp >= 1, f"ep={ep}, etp={etp}; give at least 1 each"),
        (num_experts % max(ep, 1) == 0, f"num_experts={num_experts} is no multiple of ep={ep}; give one"),
        (1 <= topk <= num_experts, f"topk is {topk}; give 1 to num_experts={num_experts}"),
        (name != "hierarchical" or fits, f"ranks_per_node={per_node} does not cut {ep} x {etp} ranks into equal nodes"),
        (direction in ("dispatch", "combine"), f"direction is {direction!r}; give dispatch or combine"),
        (
            not metadata or routing is not None,
            "metadata=True needs routing= (expected sizes of packed ids are no whole bytes)",
        ),
        (not metadata or direction == "dispatch", "metadata travels with a dispatch only; give direction='dispatch'"),
    )
    for holds, words in rules:
        if not holds:
            raise ValueError(f"traffic: {words}")

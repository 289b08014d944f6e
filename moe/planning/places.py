"""Which links a mapping's groups use: how many nodes a group spans, and the rows that experts' ranks exchange over each link.

folded      experts' ranks are the contiguous ETP x EP block of `moe.Folding`
nested      the mapping before folding: EP lies inside DP and ETP = TP, so EP ranks are TP x CP apart
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from moe.folding import Folding
from moe.traffic import traffic

MAPPINGS = ("folded", "nested")


@dataclass(frozen=True)
class Span:
    """The groups of one axis, as far as links care."""

    size: int
    """Ranks of a group."""
    per_node: int
    """Ranks that the emptiest node of any group holds."""
    nodes: int
    """Nodes of the widest group."""


@dataclass(frozen=True)
class Rows:
    """Rows that the busiest rank sends for each of its tokens, one direction of one pass."""

    inside: float
    """Over EP to ranks of its node."""
    between: float
    """Over EP out of its node."""
    etp_inside: float
    """Over ETP to ranks of its node."""
    etp_between: float
    """Over ETP out of its node."""


def check_mapping(folding: Folding, mapping: str) -> None:
    """ValueError where a folding has no such mapping."""
    if mapping not in MAPPINGS:
        raise ValueError(f"mapping is {mapping!r}; give one of {', '.join(MAPPINGS)}")
    if mapping == "nested" and (folding.etp != folding.tp or folding.dp % folding.ep):
        raise ValueError(
            f"a nested mapping has etp = tp and ep inside dp; given tp={folding.tp}, etp={folding.etp}, dp={folding.dp}, "
            f"ep={folding.ep}: give etp={folding.tp} and an ep that divides {folding.dp}, or mapping='folded'"
        )


def groups(folding: Folding, axes: str, mapping: str) -> list[list[int]]:
    """Groups of ranks of "tp", "cp", "pp", "cp-dp", "etp-ep" (in block order, ETP fastest) or "edp"."""
    check_mapping(folding, mapping)
    if mapping == "folded" or axes not in ("etp-ep", "edp"):
        return folding.groups(axes)
    f, found = folding, {}
    for rank in range(f.world):
        at = f.coordinates(rank)
        ep, rest = at["dp"] % f.ep, at["dp"] // f.ep
        if axes == "edp":
            key, place = (at["tp"], ep, at["pp"]), (rest, at["cp"])
        else:
            key, place = (at["cp"], rest, at["pp"]), (ep, at["tp"])
        found.setdefault(key, []).append((place, rank))
    return [[rank for _, rank in sorted(members)] for members in found.values()]


def span(folding: Folding, axes: str, mapping: str, ranks_per_node: int) -> Span:
    """How the groups of an axis lie on nodes.

    >>> span(Folding(world=32, tp=2, ep=8), "cp-dp", "folded", 8)
    Span(size=16, per_node=4, nodes=4)
    """
    check_mapping(folding, mapping)
    return _span(*_simplest(folding, axes, mapping), axes, ranks_per_node)


@lru_cache(maxsize=4096)
def _span(folding: Folding, mapping: str, axes: str, ranks_per_node: int) -> Span:
    found = groups(folding, axes, mapping)
    counts = [Counter(rank // ranks_per_node for rank in group) for group in found]
    return Span(len(found[0]), min(min(c.values()) for c in counts), max(len(c) for c in counts))


def rows(folding: Folding, mapping: str, ranks_per_node: int, dispatcher: str, num_experts: int, topk: int) -> Rows:
    """What one token of every rank makes the busiest rank send, by `moe.traffic`'s expected rows.

    >>> f = Folding(world=16, tp=2, ep=8, etp=2)
    >>> r = rows(f, "folded", 8, "alltoall", 64, 8)
    >>> r.inside, r.between, r.etp_inside
    (3.0, 4.0, 8.0)
    """
    check_mapping(folding, mapping)
    return _rows(*_simplest(folding, "etp-ep", mapping), ranks_per_node, dispatcher, num_experts, topk)


@lru_cache(maxsize=4096)
def _rows(folding: Folding, mapping: str, ranks_per_node: int, dispatcher: str, num_experts: int, topk: int) -> Rows:
    nodes = _block_nodes(folding, mapping, ranks_per_node)
    options = {}
    if dispatcher == "hierarchical":
        options["ranks_per_node"] = _even_nodes(nodes, folding)
    sizes = {"num_experts": num_experts, "topk": topk, "ep": folding.ep, "etp": folding.etp}
    sent = traffic(dispatcher, tokens=1, row_bytes=1, **sizes, **options)
    out = [[0.0] * 4 for _ in range(folding.ep * folding.etp)]
    for (source, destination), size in sent.items():
        same_node = nodes[source] == nodes[destination]
        same_expert = source // folding.etp == destination // folding.etp
        out[source][2 * same_expert + (not same_node)] += size
    return Rows(*(max(column) for column in zip(*out)))


def _simplest(f: Folding, axes: str, mapping: str) -> tuple[Folding, str]:
    """A mapping with the same groups on these axes that shares its cache entry with all others like it."""
    if mapping == "nested" and axes in ("etp-ep", "edp"):
        return f, mapping
    kept = {
        "tp": {"tp": f.tp},
        "cp": {"tp": f.tp, "cp": f.cp},
        "cp-dp": {"tp": f.tp, "pp": f.pp},
        "pp": {"pp": f.pp},
        "etp-ep": {"etp": f.etp, "ep": f.ep},
        "edp": {"ep": f.etp * f.ep, "pp": f.pp},
    }
    return Folding(world=f.world, **kept[axes]), "folded"


def _block_nodes(folding: Folding, mapping: str, ranks_per_node: int) -> tuple[int, ...]:
    """The node of every place of the ETP x EP block that lies on the most nodes."""
    blocks = {tuple(rank // ranks_per_node for rank in group) for group in groups(folding, "etp-ep", mapping)}
    return max(blocks, key=lambda nodes: (len(set(nodes)), nodes))


def _even_nodes(nodes: tuple[int, ...], folding: Folding) -> int:
    runs = [len(list(run)) for _, run in itertools.groupby(nodes)]
    if len(set(runs)) > 1 or len(runs) != len(set(nodes)) or runs[0] % folding.etp:
        raise ValueError(
            f"dispatcher 'hierarchical' needs experts' blocks that fill equal parts of nodes; {folding} does not: "
            "give 'dedup', or an ep x etp that fits the node"
        )
    return runs[0]

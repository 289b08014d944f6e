"""A topology as JSON and as text.

    {"format": "tokenring.topology", "version": 1, "kind": "mesh", "world": 4, "gbytes_per_s": 50.0, "latency_us": 3.0}

Fields at their default are left out; a field that is not known is refused, so a misspelt one never counts for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from itertools import islice
from pathlib import Path
from typing import Any

from tokenring.links.costs import ComputeRate, Costs, is_number
from tokenring.topology import Topology

FORMAT, VERSION = "tokenring.topology", 1
SHOWN_RATES = 16

Where = str


def to_dict(topology: Topology) -> dict[str, Any]:
    """Plain dicts, lists, numbers and strings, for JSON."""
    return {"format": FORMAT, "version": VERSION, **_plain(topology)}


def from_dict(values: Mapping[str, Any], where: Where = "topology") -> Topology:
    """The topology of `to_dict`'s values; ValueError names the key that is wrong. `where` is what errors call it."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is a {type(values).__name__}; give an object with the keys of tokenring.Topology")
    head = {key: values.get(key) for key in ("format", "version")}
    if head != {"format": FORMAT, "version": VERSION}:
        raise ValueError(
            f"{where} has format {head['format']!r}, version {head['version']!r}; "
            f'this release reads format "{FORMAT}", version {VERSION}'
        )
    return _topology({key: value for key, value in values.items() if key not in head}, where)


def save(topology: Topology, path: str | Path) -> None:
    """Write JSON."""
    Path(path).write_text(json.dumps(to_dict(topology), indent=2) + "\n", encoding="utf-8")


def load(path: str | Path) -> Topology:
    """Read JSON. ValueError names the file and what is wrong in it; OSError where it cannot be read."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; give a file that Topology.save wrote") from error
    return from_dict(values, str(path))


def describe(topology: Topology) -> str:
    """A table of links and rates, and what computing costs."""
    lines = [f"{topology.kind} of {topology.world} ranks" + (f"   ({topology.note})" if topology.note else "")]
    lines += _link_lines(topology)
    costs = topology.costs
    if costs is None:
        return "\n".join([*lines, "computing: unknown, only communication is modelled"])
    for rate in costs.compute:
        back = rate.forward_flops if rate.backward_flops is None else rate.backward_flops
        lines.append(
            f"computing {rate.dtype}: {rate.forward_flops / 1e9:.4g} Gflop/s forward, {back / 1e9:.4g} backward, "
            f"{rate.tile_us:.4g} us a kernel call"
        )
    merge = "free" if costs.merge_gbytes_per_s is None else f"{costs.merge_gbytes_per_s:.4g} GB/s"
    lines.append(
        f"a rank: merge {merge}, {costs.message_us:.4g} us a message, {costs.operation_us:.4g} us an operation, "
        f"{costs.slowdown:.0%} slower while messages move"
    )
    return "\n".join(lines)


def _link_lines(topology: Topology, indent: str = "") -> list[str]:
    limit = "" if topology.flow_gbytes_per_s is None else f", one message {topology.flow_gbytes_per_s:.4g} GB/s at most"
    what = {
        "mesh": "a link for every ordered pair",
        "switch": "a port out and a port in for every rank",
        "ring": "links to both neighbours",
        "bus": "one link for all",
        "nodes": f"between nodes, a port out and in for every {topology.nic_per}",
    }[topology.kind]
    lines = [f"{indent}{what}: {topology.gbytes_per_s:.4g} GB/s each, latency {topology.latency_us:.4g} us{limit}"]
    if topology.intra is not None:
        through = ", and its rank's port there for what leaves or enters" if topology.through_ports else ""
        lines += [f"{indent}inside each node {topology.intra.kind} of {topology.intra.world} ranks{through}"]
        lines += _link_lines(topology.intra, indent + "  ")
    lines += [f"{indent}  {name}: {value:.4g} GB/s" for name, value in islice(topology.rates, SHOWN_RATES)]
    if len(topology.rates) > SHOWN_RATES:
        lines.append(f"{indent}  and {len(topology.rates) - SHOWN_RATES} more links of their own rate")
    return lines


def _plain(value: Any) -> Any:
    """Dataclasses without what is at its default; tuples as lists."""
    if isinstance(value, (Topology, Costs, ComputeRate)):
        kept = {f.name: getattr(value, f.name) for f in fields(value)}
        defaults = {f.name: f.default for f in fields(value)}
        return {key: _plain(x) for key, x in kept.items() if x != defaults[key]}
    return [_plain(x) for x in value] if isinstance(value, tuple) else value


def _topology(values: Mapping[str, Any], where: Where) -> Topology:
    given = _known(Topology, values, where)
    if "intra" in given and given["intra"] is not None:
        given["intra"] = _topology(given["intra"], f"{where}: intra")
    if given.get("costs") is not None:
        given["costs"] = _costs(given["costs"], f"{where}: costs")
    if "rates" in given:
        given["rates"] = _rates(given["rates"], where)
    return _made(Topology, given, where)


def _costs(values: Any, where: Where) -> Costs:
    given = _known(Costs, values, where)
    if "compute" in given:
        if not isinstance(given["compute"], list):
            raise ValueError(f"{where}: compute is {given['compute']!r}; give a list of objects")
        places = [f"{where}: compute[{i}]" for i in range(len(given["compute"]))]
        given["compute"] = tuple(
            _made(ComputeRate, _known(ComputeRate, rate, place), place) for rate, place in zip(given["compute"], places)
        )
    return _made(Costs, given, where)


def _rates(values: Any, where: Where) -> tuple[tuple[str, float], ...]:
    good = isinstance(values, list) and all(
        isinstance(x, list) and len(x) == 2 and isinstance(x[0], str) and is_number(x[1]) for x in values
    )
    if not good:
        raise ValueError(f'{where}: rates is {values!r}; give a list of ["name of a link", GB/s]')
    return tuple(sorted((name, rate) for name, rate in values))


def _known(kind: type, values: Any, where: Where) -> dict[str, Any]:
    names = {f.name: f.default is MISSING for f in fields(kind)}
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {values!r}; give an object with the keys {', '.join(names)}")
    unknown = [key for key in values if key not in names]
    if unknown:
        raise ValueError(f"{where} has the key {unknown[0]!r}; allowed are {', '.join(names)}")
    missing = [name for name, needed in names.items() if needed and name not in values]
    if missing:
        raise ValueError(f"{where} lacks the key {missing[0]!r}")
    return dict(values)


def _made(kind: type, given: dict[str, Any], where: Where) -> Any:
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error

"""The sparse part of a report: which layers ran sparse, how dense they were, and what travelled beside a dense ring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ALIKE = ("layer", "path", "why", "theta", "density", "stripe_density", "wanted", "imbalance")
"""What all ranks say of a layer: figures of all of them together."""


def merge_sparse(shares: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The shares of all ranks (`launch.sparse.SparseRun.record`) as one object; None where attention was exact.

    Returns:
        `identify` and the settings that were `given`; for each of `layers` what all ranks say alike, `bytes_sent` and
        `ring_bytes` (a dense ring that passes every block all the way round) of all ranks together, and `seconds` of the
        slowest rank by phase; and of all layers `sparse` (how many ran so), `density` (their mean, computed / causal pairs,
        dense layers counted as 1), `bytes_sent` and `ring_bytes`.

    >>> layer = dict(layer=0, path="sparse", why="", theta=2.0, density=0.2, stripe_density=0.1, wanted=0.3, imbalance=1.0)
    >>> share = dict(identify="rescore", given={}, layers=[layer | dict(bytes_sent=3, ring_bytes=10, seconds={"anchor": 1.0})])
    >>> merged = merge_sparse([share, share])
    >>> merged["sparse"], merged["density"], merged["bytes_sent"], merged["ring_bytes"]
    (1, 0.2, 6, 20)
    """
    known = [share for share in shares if share is not None]
    if not known:
        return None
    layers = [_merged(told) for told in zip(*(share["layers"] for share in known), strict=True)]
    # A dense layer does not say what a ring would have sent; layers of a model are alike.
    ring = max((layer["ring_bytes"] for layer in layers), default=0)
    for layer in layers:
        layer["ring_bytes"] = layer["ring_bytes"] or ring
    return {
        "identify": known[0]["identify"],
        "given": known[0]["given"],
        "layers": layers,
        "sparse": sum(layer["path"] == "sparse" for layer in layers),
        "density": sum(layer["density"] for layer in layers) / max(1, len(layers)),
        "bytes_sent": sum(layer["bytes_sent"] for layer in layers),
        "ring_bytes": sum(layer["ring_bytes"] for layer in layers),
    }


def _merged(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = told[0]
    if any(one["layer"] != first["layer"] or one["path"] != first["path"] for one in told):
        raise ValueError(f"ranks disagree about a layer's path: {[(one['layer'], one['path']) for one in told]}")
    phases = {name for one in told for name in one["seconds"]}
    return {
        **{name: first[name] for name in ALIKE},
        "bytes_sent": sum(one["bytes_sent"] for one in told),
        "ring_bytes": sum(one["ring_bytes"] for one in told),
        "seconds": {name: max(one["seconds"].get(name, 0.0) for one in told) for name in sorted(phases)},
    }


def sparse_lines(attention: Mapping[str, Any]) -> tuple[str, ...]:
    """What the layers did, as sentences."""
    layers, sparse = attention["layers"], attention["sparse"]
    given = ", ".join(f"{name} {value}" for name, value in attention["given"].items())
    lines = [
        f"columns found by {attention['identify']}{f', {given}' if given else ''}: "
        f"{sparse} of {len(layers)} layers ran sparse, {len(layers) - sparse} dense"
    ]
    reasons: dict[str, list[int]] = {}
    for layer in layers:
        if layer["path"] == "dense":
            reasons.setdefault(layer["why"], []).append(layer["layer"])
    lines += [f"dense in {_runs(numbers)}: {why}" for why, numbers in reasons.items()]
    densities = [layer["density"] for layer in layers]
    lines.append(
        f"computed {attention['density']:.1%} of the causal pairs, from {min(densities):.1%} to {max(densities):.1%} in a layer"
    )
    return tuple(lines)


def sparse_rows(attention: Mapping[str, Any], human: Any) -> list[tuple[str, ...]]:
    """For each layer: path, theta, density, stripes, bytes, their share of a dense ring's, imbalance."""
    return [
        (
            str(layer["layer"]),
            layer["path"],
            _theta(layer["theta"]),
            f"{layer['density']:.1%}",
            f"{layer['stripe_density']:.1%}",
            human(layer["bytes_sent"]),
            f"{layer['bytes_sent'] / layer['ring_bytes']:.1%}" if layer["ring_bytes"] else "-",
            f"{layer['imbalance']:.2f}",
        )
        for layer in attention["layers"]
    ]


HEADERS = ("layer", "path", "theta", "density", "stripes", "sent", "of a dense ring", "imbalance")


def beside_dense_line(verify: Mapping[str, Any]) -> str | None:
    """How far a sparse prompt is from a dense one."""
    found = verify.get("beside_dense")
    if found is None:
        return None
    same = "the same tokens" if found["same_tokens"] else "other tokens"
    return (
        f"beside dense attention (stated, not judged): logits up to {float(found['max_logit_diff']):.2e} apart, KL "
        f"{float(found['kl']):.2e} nats, the same likeliest token in {found['top1']:.1%} of the rows, {same} written"
    )


def columns_line(verify: Mapping[str, Any]) -> str | None:
    """Whether one rank finds the columns that the ranks found."""
    if "columns" not in verify:
        return None
    other, columns = verify["columns_chosen_otherwise"], verify["columns"]
    verdict = "holds" if verify["columns_within_tolerance"] else "DOES NOT HOLD"
    return f"one rank would choose {other:,} of {columns:,} columns otherwise (allowed {verify['columns_allowed_share']:.0%}): {verdict}"


def _theta(theta: Any) -> str:
    if isinstance(theta, Sequence) and not isinstance(theta, str):
        numbers = [float(t) for t in theta]
        return f"{min(numbers):.2f} to {max(numbers):.2f}"
    return f"{float(theta):.2f}"


def _runs(numbers: Sequence[int]) -> str:
    """ "layers 0 to 3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return f"layer{'' if len(numbers) == 1 else 's'} {', '.join(shown)}"

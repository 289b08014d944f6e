"""The experts' part of a report: what their tokens cost beside attention, and how evenly the router spread them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SAME = ("experts", "topk", "ep", "etp", "edp", "dispatcher", "ranks_per_node")


def merge_experts(shares: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The shares of all ranks, in rank order (`launch.experts.Experts.record`), as one object; None without experts.

    Returns:
        the sizes; `bytes_sent[source][destination]` of rows and `metadata_bytes_sent` of what goes before them (ids, weights,
        notes), both of the whole run; and of the prefill `tokens_per_rank` (a token counts once for each expert it goes to,
        with ETP at every rank of the expert), `tokens_per_expert`, and `imbalance`: tokens of the busiest rank over the mean
        in one layer, as `mean` over the layers, and as `worst` with its `layer` and `rank`.

    >>> sizes = dict(experts=2, topk=1, ep=2, etp=1, edp=1, dispatcher="dedup", ranks_per_node=None, etp_rank=0)
    >>> sent = dict(bytes_sent=[0, 8], metadata_bytes_sent=[0, 4])
    >>> shares = [sizes | sent | dict(ep_rank=r, prefill_tokens=[[1 + 2 * r]]) for r in range(2)]
    >>> merged = merge_experts(shares)
    >>> merged["tokens_per_expert"], merged["imbalance"]
    ([1, 3], {'mean': 1.5, 'worst': 1.5, 'layer': 0, 'rank': 1})
    """
    known = [share for share in shares if share is not None]
    if not known:
        return None
    first = known[0]
    for name in SAME:
        if len(known) < len(shares) or any(share[name] != first[name] for share in known):
            raise ValueError(
                f"ranks disagree about their experts ({name}): {[share and share[name] for share in shares]}"
            )
    per_expert = [0] * first["experts"]
    for share in known:
        if share["etp_rank"] == 0:
            local = first["experts"] // first["ep"]
            for expert, tokens in enumerate(map(sum, zip(*share["prefill_tokens"]))):
                per_expert[share["ep_rank"] * local + expert] += tokens
    return {
        **{name: first[name] for name in SAME},
        "bytes_sent": [share["bytes_sent"] for share in known],
        "metadata_bytes_sent": [share["metadata_bytes_sent"] for share in known],
        "tokens_per_rank": [sum(map(sum, share["prefill_tokens"])) for share in known],
        "tokens_per_expert": per_expert,
        "imbalance": _imbalance([[sum(layer) for layer in share["prefill_tokens"]] for share in known]),
    }


def _imbalance(loads: Sequence[Sequence[int]]) -> dict[str, Any]:
    """`loads[rank][layer]`: how far the busiest rank of each layer, which all others wait for, is above the mean."""
    ratios = [max(layer) * len(layer) / max(sum(layer), 1) for layer in zip(*loads)]
    layer = ratios.index(max(ratios))
    here = [load[layer] for load in loads]
    return {
        "mean": sum(ratios) / len(ratios),
        "worst": ratios[layer],
        "layer": layer,
        "rank": here.index(max(here)),
    }


def expert_lines(experts: Mapping[str, Any]) -> tuple[str, ...]:
    """Sizes and balance as sentences."""
    uneven, per_expert = experts["imbalance"], experts["tokens_per_expert"]
    nodes = f", nodes of {experts['ranks_per_node']} ranks" if experts["ranks_per_node"] else ""
    return (
        f"{experts['experts']} experts, {experts['topk']} for each token, "
        f"EP {experts['ep']} x ETP {experts['etp']} x EDP {experts['edp']}, dispatcher {experts['dispatcher']}{nodes}",
        f"prefill: the busiest rank has {uneven['mean']:.2f} times the mean, average of the layers; "
        f"at worst {uneven['worst']:.2f} times (layer {uneven['layer']}, rank {uneven['rank']})",
        f"an expert has from {min(per_expert):,} to {max(per_expert):,} tokens of all layers",
    )


def expert_rows(report: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """For each rank: tokens, bytes of rows, bytes of metadata, and bytes of everything but experts."""
    experts = report["experts"]
    columns = (
        experts["tokens_per_rank"],
        map(sum, experts["bytes_sent"]),
        map(sum, experts["metadata_bytes_sent"]),
        map(sum, report["bytes_sent"]),
    )
    return list(zip(*columns))

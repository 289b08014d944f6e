"""AnchorAttention beside the baselines on a real model's queries and keys, at equal mass recall: density and time.

    python -m benchmarks.sparse_attention_rivals                       layer 5 of SmolLM2-135M, 32,768 tokens, three key heads
    python -m benchmarks.sparse_attention_rivals --layers 5 2 9 --key-heads 0 1 2 --out FILE

Queries and keys: `benchmarks.long_queries` (rotary embedding scaled beyond 8,192 positions by YaRN). Values are noise, on which
neither time nor recall depends. Every method finds its columns and attends with the same executor in the same process; recall
is read off the log-sum-exp that attention returns, so nothing else runs between the clocks.

Each method, ours too, has settings from sparse to dense. It starts in their middle and goes both ways until its recalls enclose
the levels, or its settings end. At each level it takes what its cheapest setting above the level takes, or less: straight between
the two settings around it, both logarithms, against log(1 - recall). A ratio is the best baseline over the best of our ways of
finding stripes, for one key head's queries. --out is written after every setting; a run that was broken off goes on from there
at the same commit.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.long_queries import captured
from benchmarks.record import Table
from sparse_attn import AnchorConfig, anchor_attention, baselines, execute
from tokenring import attention

LEVELS = 0.8, 0.85, 0.9, 0.95, 0.97, 0.99
Setting = dict[str, Any]
ANCHOR: dict[str, list[Setting]] = {
    "rescore": [{"theta": t} for t in (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)],
    "pooled": [{"theta": t} for t in (4.5, 6.0, 7.5, 9.0, 10.5, 12.0, 14.0)],
    "lse": [{"theta": t} for t in (6.0, 7.5, 9.0, 10.5, 12.0, 13.5, 15.0)],
}
RIVALS: dict[str, list[Setting]] = {
    "streaming": [{"initial": i, "local": n} for i, n in ((128, 1024), (256, 4096))]
    + [{"initial": 1024, "local": n} for n in (8192, 16384, 24576)],
    "vertical_slash": [
        {"vertical": a, "slash": b}
        for a, b in ((250, 50), (500, 100), (1000, 200), (2000, 500), (4000, 2000), (2000, 6096), (8000, 8000))
    ],
    "flexprefill": [
        {"gamma": g, "min_budget": n}
        for g, n in ((0.1, 128), (0.25, 256), (0.4, 512), (0.6, 1024), (0.8, 1024), (0.9, 1024), (0.97, 1024))
    ],
    "xattention": [{"threshold": t} for t in (0.8, 0.9, 0.95, 0.97, 0.99, 0.998, 0.9999)],
    "flashprefill": [{"alpha": a} for a in (0.3, 0.03, 0.003, 0.0003, 1e-5, 1e-7)],
}
Row = dict[str, Any]


def run(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, name: str, setting: Setting, repeats: int) -> Row:
    """Seconds (least of some, and of these what finding columns took), density and recall of one method at one setting."""
    best, finding, found, lse = math.inf, math.inf, None, dense
    for _ in range(repeats):
        start = time.perf_counter()
        if name in ANCHOR:
            config = AnchorConfig(identify=name, dense="never", **setting)
            _, lse, stats = anchor_attention(q, k, v, config=config, return_lse=True, return_stats=True)
            found, chosen = stats.plan, stats.seconds["identify"]
        else:
            found = getattr(baselines, name)(q, k, **setting)
            chosen = time.perf_counter() - start
            _, lse = execute(found, q, k, v, return_lse=True)
        best, finding = min(best, time.perf_counter() - start), min(finding, chosen)
    recall = float((lse.double() - dense).exp().clamp(max=1).mean())
    told = {"seconds": best, "finding": finding, "density": found.density, "recall": recall}
    print(
        f"{name:>16} {setting!s:>40} {best:8.3f} s ({finding:.3f} to find)  density {told['density']:.3f}  recall {recall:.4f}",
        flush=True,
    )
    return {"method": name, "setting": setting} | told


def enclose(settings: list[Setting], measure: Callable[[Setting], Row]) -> None:
    """Measure settings from the middle of sparse to dense, both ways, until the levels are enclosed or the settings end."""
    middle = len(settings) // 2
    for setting in reversed(settings[: middle + 1]):
        if measure(setting)["recall"] < LEVELS[0]:
            break
    for setting in settings[middle:]:
        if measure(setting)["recall"] >= LEVELS[-1]:
            break


def at_recall(rows: list[Row], recall: float, what: str) -> float | None:
    """The least density or seconds at which a method would reach a recall; None where no setting of it does."""
    points = sorted((-math.log(max(1 - row["recall"], 1e-9)), math.log(row[what])) for row in rows)
    x = -math.log(1 - recall)
    costs = [cost for reached, cost in points if reached >= x]
    for (a, low), (b, high) in pairwise(points):
        if a <= x < b:
            costs.append(low + (high - low) * (x - a) / (b - a))
    return math.exp(min(costs)) if costs else None


def at_levels(rows: list[Row]) -> list[Row]:
    """At each level of recall every method's seconds and density, and the best baseline over the best of ours.

    "only denser": methods none of whose settings stayed below the level, so that a sparser one might cost less.
    """
    found = []
    for level in LEVELS:
        least = {
            name: min((r["recall"] for r in rows if r["method"] == name), default=0) for name in (*ANCHOR, *RIVALS)
        }
        row: Row = {"recall": level, "only denser": [name for name, recall in least.items() if recall > level]}
        for what in ("seconds", "density"):
            each = {
                name: at_recall([r for r in rows if r["method"] == name], level, what) for name in (*ANCHOR, *RIVALS)
            }
            each = {name: value for name, value in each.items() if value is not None}
            ours, theirs = (
                min((n for n in each if n in names), key=each.get, default=None) for names in (ANCHOR, RIVALS)
            )
            row[what] = {"each": each, "best of ours": ours, "best baseline": theirs}
            if ours and theirs:
                row[what]["ratio"] = each[theirs] / each[ours]
        found.append(row)
    return found


def over_heads(levels: list[list[Row]]) -> list[Row]:
    """For each level the ratios of all key heads: geometric mean, extremes, and who was best how often."""
    found = []
    for rows in zip(*levels):
        row: Row = {"recall": rows[0]["recall"]}
        for what in ("seconds", "density"):
            told = [r[what] for r in rows if "ratio" in r[what]]
            ratios = [t["ratio"] for t in told]
            if ratios:
                best = {side: dict(Counter(t[side] for t in told)) for side in ("best of ours", "best baseline")}
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                row[what] = {"mean": mean, "least": min(ratios), "most": max(ratios), "heads": len(ratios)} | best
        found.append(row)
    return found


def one_head(table: Table, place: Row, q: Tensor, k: Tensor, repeats: int) -> Row:
    """All methods on the queries of one key head, and what they need at each level."""
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(0))
    attention(q[:, :256], k[:, :256], v[:, :256])
    start = time.perf_counter()
    _, dense = attention(q, k, v, return_lse=True)
    seconds = time.perf_counter() - start
    print(f"{place}: {q.shape[1]} tokens, {q.shape[2]} query heads; dense {seconds:.3f} s", flush=True)
    table.row(place | {"method": "dense"}, lambda: {"seconds": seconds, "density": 1.0, "recall": 1.0})
    for name, settings in (ANCHOR | RIVALS).items():

        def measure(setting: Setting, name: str = name) -> Row:
            here = place | {"method": name, "setting": setting}
            return table.row(here, lambda: run(q, k, v, dense.double(), name, setting, repeats))

        enclose(settings, measure)
    return place | {"at levels": at_levels([row for row in table.rows if place.items() <= row.items()])}


def shown(row: Row) -> str:
    """A level over all heads, in a line."""
    parts = [f"recall {row['recall']:.2f}:"]
    for what in ("density", "seconds"):
        if what in row:
            told = row[what]
            names = "; ".join(
                f"{side} {', '.join(f'{name} {count}' for name, count in told[side].items())}"
                for side in ("best of ours", "best baseline")
            )
            parts.append(
                f"{what} {told['mean']:.2f}x ({told['least']:.2f} to {told['most']:.2f}, {told['heads']} heads; {names})"
            )
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[5])
    parser.add_argument("--captured", type=int, default=32768, help="tokens of the captured text")
    parser.add_argument("--length", type=int, help="of these, so many first ones; all where not given")
    parser.add_argument("--key-heads", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write JSON, after every setting")
    args = parser.parse_args()
    length = args.length or args.captured
    table = Table(
        args.out,
        f"SmolLM2-135M, {length} tokens of a text of {args.captured}, queries of one key head at a time, "
        f"{torch.get_num_threads()} threads, least of {args.repeats} calls",
    )
    heads = []
    with torch.inference_mode():
        for layer in args.layers:
            queries, keys = (x[:, :length] for x in captured(layer, args.captured))
            each = queries.shape[2] // keys.shape[2]
            for head in args.key_heads:
                q = queries[:, :, head * each : (head + 1) * each].contiguous()
                k = keys[:, :, head : head + 1].contiguous()
                heads.append(one_head(table, {"layer": layer, "key head": head}, q, k, args.repeats))
    levels = over_heads([head["at levels"] for head in heads])
    table.write(**{"at levels": heads, "at levels, over heads": levels})
    for row in levels:
        print(shown(row))


if __name__ == "__main__":
    main()

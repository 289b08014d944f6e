"""AnchorAttention beside the baselines on a real model's queries and keys, at equal mass recall: density and time.

    python -m benchmarks.sparse_attention_rivals                       layer 5 of SmolLM2-135M, 32,768 tokens, three key heads
    python -m benchmarks.sparse_attention_rivals --layers 5 15 25 --key-heads 0 2 --length 65536 --save FILE

Queries and keys: `benchmarks.long_queries` (rotary embedding scaled beyond 8,192 positions by YaRN). Values are noise, on which
neither time nor recall depends. Every method finds its columns and attends with the same executor in the same process; recall
is read off the log-sum-exp that attention returns, so nothing else runs between the clocks. At each level of recall a method
takes what its cheapest setting above the level takes, or less: straight between the two settings around it, both logarithms,
against log(1 - recall). A ratio is the best baseline over the best of our ways of finding stripes, for one key head's queries.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.long_queries import captured
from benchmarks.record import measured
from sparse_attn import AnchorConfig, anchor_attention, baselines, execute
from tokenring import attention

LEVELS = 0.8, 0.85, 0.9, 0.95, 0.97, 0.99
ANCHOR: dict[str, tuple[float, ...]] = {
    "rescore": (3.0, 4.0, 5.0, 6.0, 7.0),
    "pooled": (6.0, 7.5, 9.0, 10.5, 12.0),
    "lse": (7.5, 9.0, 10.5, 12.0, 13.5),
}
RIVALS: dict[str, list[dict[str, Any]]] = {
    "streaming": [{"initial": 1024, "local": n} for n in (8192, 16384)],
    "vertical_slash": [{"vertical": a, "slash": b} for a, b in ((1000, 200), (2000, 500), (4000, 2000), (2000, 6096))],
    "flexprefill": [{"gamma": g, "min_budget": 1024} for g in (0.6, 0.8, 0.9)],
    "xattention": [{"threshold": t} for t in (0.97, 0.99, 0.998)],
    "flashprefill": [{"alpha": a} for a in (0.003, 0.0003, 0.00001)],
}
Row = dict[str, Any]


def run(q: Tensor, k: Tensor, v: Tensor, dense: Tensor, name: str, setting: Row, repeats: int) -> Row:
    """Seconds (least of some), density and recall of one method at one setting."""
    best, found, lse = math.inf, None, dense
    for _ in range(repeats):
        start = time.perf_counter()
        if name in ANCHOR:
            config = AnchorConfig(identify=name, dense="never", **setting)
            _, lse, stats = anchor_attention(q, k, v, config=config, return_lse=True, return_stats=True)
            found = stats.plan
        else:
            found = getattr(baselines, name)(q, k, **setting)
            _, lse = execute(found, q, k, v, return_lse=True)
        best = min(best, time.perf_counter() - start)
    recall = float((lse.double() - dense).exp().clamp(max=1).mean())
    row = {"method": name, "setting": setting, "seconds": best, "density": found.density, "recall": recall}
    print(f"{name:>16} {setting!s:>40} {best:8.3f} s  density {row['density']:.3f}  recall {recall:.4f}", flush=True)
    return row


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
    """At each level of recall every method's seconds and density, and the best baseline over the best of ours."""
    found = []
    for level in LEVELS:
        row: Row = {"recall": level}
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
    """For each level the ratios of all key heads: their geometric mean, the extremes, and who was best how often."""
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


def one_head(q: Tensor, k: Tensor, repeats: int) -> tuple[list[Row], float]:
    """All methods and settings on the queries of one key head, and the seconds of dense attention."""
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(0))
    attention(q[:, :256], k[:, :256], v[:, :256])
    start = time.perf_counter()
    _, dense = attention(q, k, v, return_lse=True)
    seconds = time.perf_counter() - start
    print(f"{q.shape[1]} tokens, {q.shape[2]} query heads of one key head; dense {seconds:.3f} s", flush=True)
    thetas = {name: [{"theta": theta} for theta in found] for name, found in ANCHOR.items()}
    settings = [(name, setting) for name, found in (thetas | RIVALS).items() for setting in found]
    return [run(q, k, v, dense.double(), name, setting, repeats) for name, setting in settings], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[5])
    parser.add_argument("--captured", type=int, default=65536, help="tokens of the captured text")
    parser.add_argument("--length", type=int, default=32768, help="of these, so many first ones")
    parser.add_argument("--key-heads", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--save", type=Path, help="write JSON")
    args = parser.parse_args()
    told: Row = measured() | {"model": "SmolLM2-135M", **{k: v for k, v in vars(args).items() if k != "save"}}
    told |= {"threads": torch.get_num_threads(), "heads": []}
    for layer in args.layers:
        queries, keys = (x[:, : args.length] for x in captured(layer, args.captured))
        each = queries.shape[2] // keys.shape[2]
        for head in args.key_heads:
            q = queries[:, :, head * each : (head + 1) * each].contiguous()
            rows, dense = one_head(q, keys[:, :, head : head + 1].contiguous(), args.repeats)
            place = {"layer": layer, "key head": head, "dense seconds": dense}
            told["heads"].append(place | {"rows": rows, "at levels": at_levels(rows)})
    told["at levels, over heads"] = over_heads([head["at levels"] for head in told["heads"]])
    for row in told["at levels, over heads"]:
        print(row)
    if args.save:
        args.save.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()

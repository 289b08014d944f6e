"""AnchorAttention beside the baselines on a real model's queries and keys, at equal mass recall: density and time.

    python -m benchmarks.sparse_attention_rivals                       layer 5 of SmolLM2-135M, 32,768 tokens, one key head
    python -m benchmarks.sparse_attention_rivals --layer 15 --key-head 2 --save FILE

Queries and keys: `benchmarks.long_queries` (rotary embedding scaled beyond 8,192 positions by YaRN). Values are noise, on which
neither time nor recall depends. Every method finds its columns and attends with the same executor in the same process; recall
is read off the log-sum-exp that attention returns, so nothing else runs between the clocks. At each of our settings the
baselines are read at the same recall, straight between the two of their settings around it in log(1 - recall).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.long_queries import captured
from benchmarks.record import measured
from sparse_attn import AnchorConfig, anchor_attention, baselines, execute
from tokenring import attention

ANCHOR: dict[str, tuple[float, ...]] = {"rescore": (4.0, 6.0, 8.0), "pooled": (6.0, 9.0, 12.0)}
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
    """A method's density or seconds where it would reach a recall; None outside its settings."""
    points = sorted((-math.log(max(1 - row["recall"], 1e-9)), math.log(row[what])) for row in rows)
    x = -math.log(max(1 - recall, 1e-9))
    for (a, low), (b, high) in pairwise(points):
        if a <= x <= b:
            return math.exp(low + (high - low) * (x - a) / max(b - a, 1e-12))
    return None


def compared(rows: list[Row]) -> list[Row]:
    """Each of our settings beside every baseline at its recall, and beside the best of them."""
    found = []
    for ours in (row for row in rows if row["method"] in ANCHOR):
        row = {"method": ours["method"], "theta": ours["setting"]["theta"], "recall": ours["recall"]}
        for what in ("density", "seconds"):
            others = {n: at_recall([r for r in rows if r["method"] == n], ours["recall"], what) for n in RIVALS}
            ratios = {name: value / ours[what] for name, value in others.items() if value is not None}
            best = min(ratios, key=lambda name: ratios[name]) if ratios else None
            row[what] = {"ours": ours[what], "baseline / ours": ratios, "best baseline": best}
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--captured", type=int, default=32768, help="tokens of the captured text")
    parser.add_argument("--length", type=int, default=32768, help="of these, so many first ones")
    parser.add_argument("--key-head", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--save", type=Path, help="write JSON")
    args = parser.parse_args()
    told: Row = measured() | {
        "model": "SmolLM2-135M",
        **{k: v for k, v in vars(args).items() if k != "save"},
        "threads": torch.get_num_threads(),
    }
    q, k = (x[:, : args.length] for x in captured(args.layer, args.captured))
    each = q.shape[2] // k.shape[2]
    q, k = q[:, :, args.key_head * each :][:, :, :each].contiguous(), k[:, :, args.key_head :][:, :, :1].contiguous()
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    _, dense = attention(q, k, v, return_lse=True)
    told["dense seconds"] = time.perf_counter() - start
    print(f"{q.shape[1]} tokens, {each} query heads of one key head; dense {told['dense seconds']:.3f} s", flush=True)
    rows = []
    thetas = {name: [{"theta": theta} for theta in found] for name, found in ANCHOR.items()}
    for name, settings in (thetas | RIVALS).items():
        rows += [run(q, k, v, dense.double(), name, setting, args.repeats) for setting in settings]
    told |= {"rows": rows, "at equal recall": compared(rows)}
    for row in told["at equal recall"]:
        print(row)
    if args.save:
        args.save.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()

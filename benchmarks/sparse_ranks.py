"""AnchorAttention across ranks: what travels beside a dense ring, and how even the work is, forward and backward.

    python -m benchmarks.sparse_ranks --out benchmarks/results/sparse_ranks.json      all cases: planted, and a real model's
    python -m benchmarks.sparse_ranks --cases model --layer 15 --length 8192          SmolLM2's queries and keys over real text

Bytes are counted where they leave and equal those of the plans. Ranks are threads of one process, one core each, so links are
not measured here (`python -m benchmarks.linklab sparse` does that); seconds are each rank's own processor time.

    ring      every block all the way round: 2 Hkv D N (P - 1) bytes an element, the usual yardstick; its backward sends keys,
              values and their gradients in float32
    union     rows of keys that ranks wanted of one another / all rows of others, anchor regions included
    even      largest over mean of the ranks' pairs, and of their processor seconds
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenring as tr
from benchmarks.long_queries import captured
from benchmarks.record import write
from benchmarks.sparse_ranks_data import at_stripes, planted
from sparse_attn import AnchorConfig, anchor_attention
from sparse_attn.distributed import attend, group_layout

MOST = {
    ("planted", "pooled"): 0.15,
    ("planted", "rescore"): 0.15,
    ("model", "pooled"): 0.45,
    ("model", "rescore"): 0.60,
}
"""Share of a dense ring's bytes that is aimed at, with 10% of the columns kept."""
LONG = 65536
"""From here on `pooled` is to send at most the union of wanted rows and OVER_UNION of a dense ring."""
OVER_UNION, UNEVEN = 0.03, 1.15


def on_rank(
    group: Any, layout: tr.Layout, given: tuple[Tensor, ...], config: AnchorConfig, do: Tensor
) -> dict[str, Any]:
    """One rank's rows, statistics, counted bytes and processor seconds, forward and backward."""
    rank = group.rank()
    mine = [layout.shard(x, rank).requires_grad_() for x in given]
    with tr.count_traffic(group) as traffic:
        start = time.thread_time()
        out, stats = attend(*mine, group=group, layout=layout, config=config, return_stats=True)
        middle, there = time.thread_time(), sum(traffic.sent.values())
        out.backward(layout.shard(do, rank))
        seconds = middle - start, time.thread_time() - middle
    assert there == stats.bytes_sent
    return {
        "out": out.detach(),
        "stats": stats,
        "sent": (there, sum(traffic.sent.values()) - there),
        "seconds": seconds,
    }


def case(given: tuple[Tensor, ...], config: AnchorConfig, world: int, check: bool) -> dict[str, Any]:
    """Everything about one configuration."""
    q, k, v = given
    layout = group_layout(q.shape[1], world, config)
    results = tr.run_local(world, on_rank, layout, given, config, torch.randn_like(q))
    stats, sent = results[0]["stats"], [sum(r["sent"][i] for r in results) for i in (0, 1)]
    shape = tr.AttentionShape(1, q.shape[1], q.shape[1], q.shape[2], k.shape[2], q.shape[3], dtype=q.dtype)
    ring = sum(r["stats"].ring_bytes for r in results)
    back = _bytes("ring", shape, layout, "backward")
    least = min(_bytes(name, shape, layout) for name in ("ring", "biring", "gather", "tokenring"))
    seconds = [[r["seconds"][i] for r in results] for i in (0, 1)]
    row = {
        "identify": config.identify,
        "theta": config.theta,
        "stripes": stats.stripe_density,
        "density": stats.density,
        "union": stats.wanted,
        "bytes / ring": sent[0] / ring,
        "bytes / least dense": sent[0] / least,
        "backward bytes / ring": sent[1] / back,
        "even, pairs": stats.imbalance,
        "even, seconds": [max(x) * len(x) / sum(x) for x in seconds],
        "seconds of ranks": seconds,
        "parts / ring": {p.schedule: sum(map(p.bytes_sent, range(world))) / ring for p in stats.plans},
    }
    if check:
        whole = anchor_attention(q, k, v, config=config)
        row["largest difference"] = max(
            float((r["out"] - layout.shard(whole, rank)).abs().max()) for rank, r in enumerate(results)
        )
    return row


def _bytes(schedule: str, shape: tr.AttentionShape, layout: tr.Layout, direction: str = "forward") -> int:
    plan = tr.plan(schedule, world=layout.world, shape=shape, layout=layout, direction=direction)
    return sum(map(plan.bytes_sent, range(layout.world)))


def judged(kind: str, length: int, row: dict[str, Any]) -> dict[str, Any]:
    """The row with what it had to reach."""
    most = MOST.get((kind, row["identify"]), 1.0)
    if row["identify"] == "pooled" and length >= LONG:
        most = min(most, row["union"] + OVER_UNION)
    held = row["bytes / ring"] <= most and row["even, pairs"] <= UNEVEN
    return row | {"aim": f"at most {most:.2%} of the ring, even within {UNEVEN}", "held": held}


def shown(row: dict[str, Any]) -> str:
    """One configuration, in two lines."""
    parts = ", ".join(f"{name.removeprefix('anchor:')} {share:.2%}" for name, share in row["parts / ring"].items())
    even = ", ".join(f"{x:.3f}" for x in (row["even, pairs"], *row["even, seconds"]))
    text = (
        f"{row['identify']:>8}  theta {row['theta']:.2f}, stripes {row['stripes']:.1%}, density {row['density']:.1%}, union "
        f"{row['union']:.2%}: {row['bytes / ring']:.2%} of ring, {row['bytes / least dense']:.2%} of the least dense; backward "
        f"{row['backward bytes / ring']:.2%}; even {even} (pairs, seconds there and back)\n"
        f"          {parts}; {row['aim']}: {'held' if row['held'] else 'MISSED'}"
    )
    return text + (f"; differs by {row['largest difference']:.1e}" if "largest difference" in row else "")


def inputs(args: argparse.Namespace) -> Iterator[tuple[str, str, tuple[Tensor, ...]]]:
    """Kind, title and tensors of each case."""
    heads = tuple(args.heads)
    for kind in args.cases:
        if kind == "planted":
            length = args.length or 65536
            title = f"planted columns, {length} positions, {heads[0]} query and {heads[1]} key heads of 64"
            yield kind, title, planted(length, heads, 64, args.stripes, torch.float32)
            continue
        for length in [args.length] if args.length else args.lengths:
            q, k = captured(args.layer, length)
            title = f"SmolLM2-135M, layer {args.layer}, {length} tokens of English, {q.shape[2]} query and {k.shape[2]} key heads"
            yield kind, title, (q, k, torch.randn(k.shape, generator=torch.Generator().manual_seed(0)))


def arguments() -> argparse.Namespace:
    """What the command was given."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", nargs="+", choices=("planted", "model"), default=["planted", "model"])
    p.add_argument("--length", type=int, help="of every case; 64k planted, --lengths of the model where not given")
    p.add_argument("--lengths", type=int, nargs="+", default=[8192, 65536], help="of the model's text")
    p.add_argument("--layer", type=int, default=5, help="of the model")
    p.add_argument("--world", type=int, default=4)
    p.add_argument("--heads", type=int, nargs=2, default=(4, 2), metavar=("QUERY", "KEY"), help="planted")
    p.add_argument("--stripes", type=float, default=0.1, help="share of columns that are kept")
    p.add_argument("--identify", nargs="+", default=["pooled", "rescore"])
    p.add_argument("--check", action="store_true", help="compare with one device")
    p.add_argument("--out", type=Path, help="write JSON")
    return p.parse_args()


def main() -> None:
    """The command."""
    args = arguments()
    torch.set_num_threads(1)
    rows = []
    for kind, title, given in inputs(args):
        print(f"{title}, {args.world} ranks", flush=True)
        for identify in args.identify:
            config = AnchorConfig(identify=identify, dense="never")
            config = at_stripes(*given[:2], config, args.stripes)
            rows.append(
                {"case": title, "world": args.world}
                | judged(kind, given[0].shape[1], case(given, config, args.world, args.check))
            )
            print(shown(rows[-1]), flush=True)
            if args.out:
                write(
                    args.out,
                    "bytes counted where they leave beside a dense ring's; pairs and processor seconds of ranks",
                    rows,
                )


if __name__ == "__main__":
    main()

"""AnchorAttention across ranks: what travels beside a dense ring, how even the work is, and what the links would take.

    python benchmarks/sparse_ranks.py                              planted columns, 64k positions over 4 ranks
    python benchmarks/sparse_ranks.py --model LAYER --length 8192  SmolLM2's queries and keys over real text

Bytes are counted where they leave and equal those of the plans; ranks are threads of one process, so no time is measured.
Seconds on links are modelled by the plans themselves, transfers alone, dense schedules beside them.

    ring      every block all the way round: 2 Hkv D N (P - 1) bytes an element, the usual yardstick
    causal    the least that a dense schedule of tokenring sends: rows that no later rank wants stop travelling
    union     rows of keys that ranks wanted of one another / all rows of others, anchor regions included
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import tokenring as tr
from sparse_attn import AnchorConfig, anchor_attention, plan
from sparse_attn.distributed import attend, group_layout

WHOLE = 16384
"""Up to so many positions all heads settle theta."""
DENSE = ("ring", "biring", "gather", "tokenring")


def planted(length: int, heads: tuple[int, int], dim: int, share: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v: every key head has keys of its own, a share of them, where its queries look, and all see the first four."""
    make = torch.Generator().manual_seed(0)
    wanted = torch.nn.functional.normalize(torch.randn(heads[1], dim, generator=make), dim=1)
    q = torch.randn(1, length, heads[0], dim, generator=make) + 6 * wanted.repeat_interleave(heads[0] // heads[1], 0)
    k, v = (torch.randn(1, length, heads[1], dim, generator=make) for _ in range(2))
    chosen = torch.rand(length, heads[1], 1, generator=make) < share
    k += 10 * wanted * chosen
    k[:, :4] += 12 * wanted
    return tuple(x.to(dtype) for x in (q, k, v))


def of_model(layer: int, length: int) -> tuple[Tensor, ...]:
    """SmolLM2's queries and keys of one layer over real text; values are noise, which no byte depends on."""
    from benchmarks.sparse_attention_quality import Model, with_recording

    model, samples = Model(), {}
    with torch.no_grad(), with_recording(model.model, samples):
        model.hidden(model.ids("reference", length))
    q, k = samples[layer]
    return q, k, torch.randn(k.shape, generator=torch.Generator().manual_seed(0))


def at_stripes(q: Tensor, k: Tensor, config: AnchorConfig, target: float) -> AnchorConfig:
    """The configuration with the theta that keeps a share of columns (the paper's ratio); long inputs: for the first key head."""
    if q.shape[1] > WHOLE:
        q, k = q[:, :, : q.shape[2] // k.shape[2]], k[:, :, :1]
    low, high = -5.0, 25.0
    for _ in range(10):
        middle = (low + high) / 2
        found = plan(q, k, config=replace(config, theta=middle)).stripe_density
        low, high = (middle, high) if found < target else (low, middle)
    return replace(config, theta=high)


def on_rank(group: Any, layout: tr.Layout, given: tuple[Tensor, ...], config: AnchorConfig) -> tuple[Tensor, Any, int]:
    """One rank's rows, statistics and counted bytes."""
    rank = group.rank()
    with tr.count_traffic(group) as traffic:
        mine = (layout.shard(x, rank) for x in given)
        out, stats = attend(*mine, group=group, layout=layout, config=config, return_stats=True)
    return out, stats, sum(traffic.sent.values())


def case(
    given: tuple[Tensor, ...], config: AnchorConfig, world: int, topology: tr.Topology, check: bool
) -> dict[str, Any]:
    """Everything about one configuration."""
    q, k, v = given
    layout = group_layout(q.shape[1], world, config)
    results = tr.run_local(world, on_rank, layout, given, config)
    stats = [s for _, s, _ in results]
    assert [s.bytes_sent for s in stats] == [count for *_, count in results]
    ring = sum(s.ring_bytes for s in stats)
    shape = tr.AttentionShape(
        q.shape[0], q.shape[1], q.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype
    )
    dense = {name: tr.plan(name, world=world, shape=shape, layout=layout) for name in DENSE}
    least = min(sum(p.bytes_sent(r) for r in range(world)) for p in dense.values())
    sent = sum(s.bytes_sent for s in stats)
    row = {
        "identify": config.identify,
        "theta": round(config.theta, 3),
        "stripes": stats[0].stripe_density,
        "density": stats[0].density,
        "union": stats[0].wanted,
        "bytes/ring": sent / ring,
        "bytes/causal": sent / least,
        "imbalance": stats[0].imbalance,
        "parts": {p.schedule: sum(p.bytes_sent(r) for r in range(world)) / ring for p in stats[0].plans},
        "transfer seconds (modelled)": sum(p.simulate(topology).seconds for p in stats[0].plans),
    }
    if check:
        whole = anchor_attention(q, k, v, config=config)
        row["largest difference"] = max(
            float((out - layout.shard(whole, r)).abs().max()) for r, (out, *_) in enumerate(results)
        )
    return row


def shown(row: dict[str, Any]) -> str:
    """One line."""
    parts = ", ".join(f"{name.removeprefix('anchor:')} {share:.2%}" for name, share in row["parts"].items())
    text = (
        f"{row['identify']:>8} theta {row['theta']:<7} stripes {row['stripes']:.1%} density {row['density']:.1%} | "
        f"union {row['union']:.2%} bytes {row['bytes/ring']:.2%} of ring, {row['bytes/causal']:.2%} of the least dense | "
        f"imbalance {row['imbalance']:.3f} | {parts}"
    )
    return text + (f" | differs by {row['largest difference']:.1e}" if "largest difference" in row else "")


def arguments() -> argparse.Namespace:
    """What the command was given."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--length", type=int, default=65536)
    p.add_argument("--world", type=int, default=4)
    p.add_argument("--heads", type=int, nargs=2, default=(4, 2), metavar=("QUERY", "KEY"))
    p.add_argument("--dim", type=int, default=64)
    p.add_argument("--stripes", type=float, nargs="+", default=[0.1])
    p.add_argument("--identify", nargs="+", default=["pooled", "rescore"])
    p.add_argument("--share", default="query")
    p.add_argument("--planted", type=float, default=0.1, help="share of keys that are looked at")
    p.add_argument("--model", type=int, metavar="LAYER", help="SmolLM2's queries and keys of this layer instead")
    p.add_argument("--gbytes", type=float, default=1.25, help="rate of each link, for the modelled seconds")
    p.add_argument("--check", action="store_true", help="compare with one device")
    p.add_argument("--json", help="write the rows there")
    return p.parse_args()


def main() -> None:
    """The command."""
    args = arguments()
    torch.set_num_threads(1)
    heads = tuple(args.heads)
    given = (
        of_model(args.model, args.length)
        if args.model is not None
        else planted(args.length, heads, args.dim, args.planted, torch.float32)
    )
    topology = tr.Topology.switch(args.world, args.gbytes)
    print(
        f"{given[0].shape[1]} positions, {args.world} ranks, {given[0].shape[2]} query and {given[1].shape[2]} key heads"
    )
    rows = []
    for identify in args.identify:
        for stripes in args.stripes:
            config = AnchorConfig(identify=identify, share=args.share, dense="never")
            config = at_stripes(*given[:2], config, stripes)
            rows.append(case(given, config, args.world, topology, args.check))
            print(shown(rows[-1]), flush=True)
    (_, length, q_heads, dim), kv_heads = given[0].shape, given[1].shape[2]
    shape = tr.AttentionShape(1, length, length, q_heads, kv_heads, dim, dtype=torch.float32)
    layout = group_layout(length, args.world)
    seconds = {n: tr.plan(n, world=args.world, shape=shape, layout=layout).simulate(topology).seconds for n in DENSE}
    print(
        "modelled seconds on the links:",
        {r["identify"]: round(r["transfer seconds (modelled)"], 4) for r in rows},
        seconds,
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"rows": rows, "dense seconds (modelled)": seconds}, file, indent=1)


if __name__ == "__main__":
    main()

"""One layer of AnchorAttention on a CPU beside torch's own flash operator, causal: identification, gather and merge included.

    python -m benchmarks.sparse_attention --lengths 8192 16384 32768 131072 [--heads 1] [--turns 5] [--out FILE]
    python -m benchmarks.sparse_attention --fallback                dense path and short sequences: overhead over the operator

float32, D = 64, queries and keys with planted stripes: a tenth of the columns is wanted by every query, the rest by none.
Theta is found by bisection so that the paper's ratio is 10%. Each turn times dense once and every method once, one after
another; figures are medians of the ratios within a turn. `of ideal` is the speed-up times the density.
--cpu-time counts this process's processor time in place of the wall clock, for machines that do other work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import write
from sparse_attn import AnchorConfig, Stats, anchor_attention, plan

DIM = 64
METHODS = ("pooled", "lse", "rescore")


def planted(length: int, heads: int, share: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, length, heads, 64): a share of the keys, and the first four, lie where all queries look."""
    make = torch.Generator().manual_seed(seed)
    wanted = torch.nn.functional.normalize(torch.randn(DIM, generator=make), dim=0)
    q, k, v = (torch.randn(1, length, heads, DIM, generator=make) for _ in range(3))
    k[:, torch.rand(length, generator=make) < share] += 10 * wanted
    k[:, :4] += 12 * wanted
    return q + 6 * wanted, k, v


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The operator, and nothing else."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (q, k, v)), 0.0, True
    )[0]


def at_density(q: Tensor, k: Tensor, config: AnchorConfig, target: float) -> AnchorConfig:
    """The configuration with the theta that gives the paper's ratio."""
    low, high = -5.0, 25.0
    for _ in range(12):
        middle = (low + high) / 2
        found = plan(q[:, :, :1], k[:, :, :1], config=replace(config, theta=middle)).stripe_density
        low, high = (middle, high) if found < target else (low, middle)
    return replace(config, theta=high)


def timed(clock: Callable[[], float], call: Callable[[], Any]) -> tuple[float, Any]:
    start = clock()
    result = call()
    return clock() - start, result


def speed(args: argparse.Namespace, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Every length and method."""
    rows = []
    for length in args.lengths:
        q, k, v = planted(length, args.heads, args.stripes)
        plain = {m: AnchorConfig(identify=m, dense="never", block=args.block, step=args.step) for m in args.methods}
        configs = {name: at_density(q, k, config, args.stripes) for name, config in plain.items()}
        ratios: dict[str, list[float]] = {name: [] for name in configs}
        last: dict[str, Stats] = {}
        for _ in range(args.turns):
            base, _ = timed(clock, lambda: dense(q, k, v))  # noqa: B023
            for name, config in configs.items():
                own, (_, last[name]) = timed(clock, lambda: anchor_attention(q, k, v, config=config, return_stats=True))  # noqa: B023
                ratios[name].append(base / own)
        for name, config in configs.items():
            middle, stats = statistics.median(ratios[name]), last[name]
            row = {"length": length, "heads": args.heads, "method": name, "theta": config.theta, "speedup": middle}
            row |= {"lowest": min(ratios[name]), "highest": max(ratios[name]), "density": stats.density}
            row |= {"stripes": stats.stripe_density, "of_ideal": middle * stats.density, "seconds": stats.seconds}
            rows.append(row)
            phases = ", ".join(f"{phase} {seconds * 1e3:.1f} ms" for phase, seconds in stats.seconds.items())
            print(
                f"{length:>7} {name:>8}  {middle:5.2f}x ({min(ratios[name]):.2f} to {max(ratios[name]):.2f})  "
                f"density {stats.density:.3f}  stripes {stats.stripe_density:.3f}  of ideal {row['of_ideal']:.2f}  {phases}",
                flush=True,
            )
    return rows


def fallback(args: argparse.Namespace, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """The default configuration on random inputs, where no column stands out, and a theta that keeps everything."""
    rows = []
    for length in (1, 16, 128, 512, 1024, 2048, 4096, 8192):
        q, k, v = (torch.randn(1, length, args.heads, DIM) for _ in range(3))
        for name, config in {"default": AnchorConfig(), "keep all": AnchorConfig(theta=1e9)}.items():
            pairs = []
            for _ in range(max(5, args.turns * 8192 // max(length, 64))):
                base, _ = timed(clock, lambda: dense(q, k, v))  # noqa: B023
                own, (_, stats) = timed(clock, lambda: anchor_attention(q, k, v, config=config, return_stats=True))  # noqa: B023
                pairs.append((own - base, base, stats.path))
            extra, base = statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)
            allowed = 0.05 * base + 50e-6
            rows.append({"length": length, "config": name, "extra_s": extra, "dense_s": base, "path": pairs[-1][2]})
            print(
                f"{length:>6} {name:>8} {pairs[-1][2]:>6}: {extra * 1e6:+9.0f} us over {base * 1e6:9.0f} us; allowed {allowed * 1e6:.0f}"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 131072])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--stripes", type=float, default=0.1, help="the paper's ratio to reach")
    parser.add_argument("--block", type=lambda s: s if s == "auto" else int(s), default="auto")
    parser.add_argument("--step", type=lambda s: s if s == "auto" else int(s), default="auto")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--fallback", action="store_true")
    parser.add_argument("--out", type=Path, help="write JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        clock = time.process_time if args.cpu_time else time.perf_counter
        rows = (fallback if args.fallback else speed)(args, clock)
    if args.out:
        what = "dense path and short sequences" if args.fallback else "one layer beside torch's flash operator, causal"
        write(args.out, what, rows, threads=args.threads, clock="process" if args.cpu_time else "wall")


if __name__ == "__main__":
    main()

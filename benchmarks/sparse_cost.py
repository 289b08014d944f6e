"""The constants of the choice between stripes and dense attention (`sparse_attn.cost`), measured, and what they promise.

    python -m benchmarks.sparse_cost [--lengths 8192 16384 32768] [--turns 7] [--out FILE]

One head, D = 64, float32, one thread. All in pairs of torch's flash operator, causal, at the same length in the same turn; medians.

    anchor pair    phase 1 / pairs of its regions
    call, row      phase 3 on lists of n columns for groups of R rows: t = call + n * row + n * R * pair, by least squares
    product        a product of the exact test, rows by columns, in the dtype that it takes
    promised       what `sparse_cost` says of whole calls on planted stripes, beside what they took
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
from benchmarks.sparse_attention import at_density, dense, planted
from sparse_attn import AnchorConfig, anchor_attention, cost
from sparse_attn.geometry import Geometry
from sparse_attn.identify import finder
from sparse_attn.identify.products import reached, test_dtype, with_ones
from sparse_attn.kernels.resumed import Resumed
from sparse_attn.kernels.torch_kernel import TorchKernel

Row = dict[str, Any]
ROWS = 128, 256, 512, 1024
COLUMNS = 128, 512, 2048


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def middle(turns: int, call: Callable[[], object]) -> float:
    """Median seconds of some calls."""
    return statistics.median(seconds(call) for _ in range(turns))


def geometry(length: int) -> Geometry:
    return Geometry.of((((0, length), (0, length)),), *cost.groups_for(length))


def anchor_pair(length: int, turns: int) -> Row:
    """Phase 1 beside the operator, a pair each."""
    q, k, v = planted(length, 1, 0.1)
    g, kernel = geometry(length), TorchKernel("auto", q, v, 0.125)
    ratios = []
    for _ in range(turns):
        pair = seconds(lambda: dense(q, k, v)) / g.causal_pairs
        ratios.append(seconds(lambda: kernel.anchor(q, k, v, g, None)) / g.anchor_pairs / pair)
    return {"what": "anchor pair", "length": length, "pairs": statistics.median(ratios)}


def lists(turns: int, pair: float, length: int = 65536) -> Row:
    """Calls and gathered rows of phase 3, by least squares over groups and lists of several sizes; every tenth key is asked for."""
    q, k, v = planted(length, 1, 0.1)
    resumed = Resumed(q, k, v, 0.125)
    out, lse = torch.zeros_like(q), torch.full((1, 1, length), 3.0)
    left, right = [], []
    for rows in ROWS:
        for count in COLUMNS:
            columns = torch.arange(0, 10 * count, 10, dtype=torch.int32) % length
            here = slice(0, rows), slice(0, 1)
            took = middle(9 * turns, lambda: resumed.join_(out, lse, 0, *here, 0, columns))  # noqa: B023
            left.append([1 / took, count / took, count * rows / took])
            right.append([1.0])
    call, row, own = torch.linalg.lstsq(torch.tensor(left, dtype=torch.float64), torch.tensor(right).double())[0][:, 0]
    return {"what": "call, row", "pairs": [float(call) / pair, float(row) / pair], "own pair": float(own) / pair}


def product(turns: int, pair: float) -> Row:
    """One product of the exact test."""
    q, k, _ = planted(8192, 1, 0.1)
    dtype = test_dtype(q, "auto")
    rows, keys = (with_ones(x, dtype)[0] for x in (q[:, :512], k[:, :5000]))
    took = middle(9 * turns, lambda: reached(rows, keys[0]))
    return {"what": "product", "dtype": str(dtype), "pairs": took / (512 * 5000) / pair}


def promised(length: int, identify: str, stripes: float, turns: int) -> Row:
    """Modelled and measured cost of whole calls, as shares of dense attention."""
    q, k, v = planted(length, 1, stripes)
    config = at_density(q, k, AnchorConfig(identify=identify, dense="never"), stripes)
    ratios, stats = [], None
    for _ in range(turns):
        base = seconds(lambda: dense(q, k, v))
        start = time.perf_counter()
        _, stats = anchor_attention(q, k, v, config=config, return_stats=True)
        ratios.append((time.perf_counter() - start) / base)
    g = geometry(length)
    kept = float((stats.plan.counts.flatten() * torch.tensor([x.count for x in g.groups])).sum()) / g.candidate_pairs
    modelled = cost.sparse_cost(g, config, 1, 64, kept, passed(q, k, v, g, config)) / g.causal_pairs
    return {
        "what": "promised",
        "length": length,
        "identify": identify,
        "kept": kept,
        "modelled": modelled,
        "measured": statistics.median(ratios),
    }


def passed(q: Tensor, k: Tensor, v: Tensor, g: Geometry, config: AnchorConfig) -> float:
    """The share of candidates of the last group that are tested."""
    state = TorchKernel("auto", q, v, 0.125).anchor(q, k, v, g, None)
    found = finder(q, k, state, g, replace(config), 0.125).passed(g.groups[-1], 0)
    return float(found.double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        q, k, v = planted(16384, 1, 0.1)
        pair = middle(args.turns, lambda: dense(q, k, v)) / geometry(16384).causal_pairs
        rows = [{"what": "operator", "pairs a nanosecond": 1e-9 / pair}]
        rows += [lists(args.turns, pair), product(args.turns, pair)]
        rows += [anchor_pair(length, args.turns) for length in args.lengths]
        for length in args.lengths:
            rows += [
                promised(length, name, share, args.turns) for name in ("pooled", "rescore") for share in (0.1, 0.3)
            ]
    for row in rows:
        print(
            ", ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
        )
    if args.out:
        write(args.out, "constants of the choice between stripes and dense attention", rows)


if __name__ == "__main__":
    main()

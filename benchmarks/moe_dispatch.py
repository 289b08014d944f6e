"""Dispatch and combine, forward and backward, on CPUs over gloo: our dispatchers beside other libraries', in one run.

    python -m benchmarks.moe_dispatch [--ranks 4 8] [--workloads W0 ...] [--out benchmarks/results/moe_dispatch.json]

Experts are the identity, and already weighted, on all sides. Every turn times each contender once, one after another; a turn's
time is that of its slowest rank; figures are medians over turns, ratios are medians of the turns' ratios. Bytes are the rows
that left all ranks. Memory is what a step adds at most to a process, the largest of the ranks; every contender has run before
it is measured, with W6 once for every rank that gets hot, with W7 through one burst. Ours get the memory that each of them used
before, not one another's.

The first workload is timed `--turns` times with everyone, the others `--other-turns` times with those that the claims are about.
Megatron-Core and DeepSpeed take part where they can be imported (`moe_rivals.py`); DeepSpeed on the first workload and the
first number of ranks only, as it pads every expert to the busiest one's tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks import record
from benchmarks.moe_rivals import DEEPSPEED, MEGATRON, rivals
from moe import build_dispatcher, traffic
from moe.dispatch import pages
from moe.workloads import WORKLOADS, routing

OURS = ("dedup", "hierarchical", "alltoall", "allgather")
CLAIMED = ("dedup", "alltoall", *MEGATRON)


def ours(name: str, group: dist.ProcessGroup, options: argparse.Namespace) -> Callable[..., Tensor]:
    """One of our dispatchers on the whole group as EP."""
    nodes = {"ranks_per_node": max(1, group.size() // 2)} if name == "hierarchical" else {}
    d = build_dispatcher(name, num_experts=options.experts, ep_group=group, **nodes)

    def step(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sent = d.dispatch(hidden, ids, weights)
        return d.combine(sent.tokens, sent, weighted=True)

    return step


def peak_bytes(reset: bool) -> int:
    """Resident high-water mark of this process; `reset` makes it start from here, with no memory waiting to be used again."""
    if reset:
        gc.collect()
        pages.WAITING.clear()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def worker(rank: int, world: int, store: str, options: argparse.Namespace) -> None:
    """One rank: all contenders on all workloads; the first rank prints and keeps each workload's figures as they come."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    group = dist.group.WORLD
    singles = [dist.new_group([r]) for r in range(world)]
    steps = {name: ours(name, group, options) for name in OURS}
    if options.rivals:
        steps |= rivals(group, options, singles[rank])
    for number, workload in enumerate(options.workloads):
        taking_part = [name for name in steps if takes_part(name, workload, number, world, options)]
        turns = options.turns if number == 0 else options.other_turns
        found = run_workload(workload, {name: steps[name] for name in taking_part}, group, turns, options)
        if rank == 0:
            show(found)
            keep(found, options)
    dist.barrier()
    dist.destroy_process_group()


def takes_part(name: str, workload: str, number: int, world: int, options: argparse.Namespace) -> bool:
    """Megatron-Core and DeepSpeed want equally many tokens on every rank, which W4 does not have."""
    if name == DEEPSPEED:
        return number == 0 and world == options.ranks[0] and workload != "W4"
    return (number == 0 or name in CLAIMED) and not (workload == "W4" and name in MEGATRON)


def run_workload(
    workload: str,
    steps: dict[str, Callable[..., Tensor]],
    group: dist.ProcessGroup,
    turns: int,
    options: argparse.Namespace,
) -> dict:
    """Times of every turn, peak memory and bytes of every contender."""
    rank, world = group.rank(), group.size()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = dict.fromkeys(seconds, 0)
    shelves = {name: pages.Shelf(pages.KEPT_BYTES) for name in steps}
    before = 2 + {"W6": world, "W7": 4}.get(workload, 0)
    for turn in range(-before, turns):
        ids = routing(workload, options.tokens, options.experts, options.topk, world, seed=1, step=turn + before)
        draw = torch.Generator().manual_seed(rank)
        n = ids[rank].shape[0]
        hidden, d_out = (torch.randn(n, options.hidden, generator=draw) for _ in range(2))
        weights = torch.rand(n, options.topk, generator=draw)
        results = {}
        # everyone comes first, and after everyone else, in turn: what ran before leaves caches and the heap in another state
        order = list(seconds)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            pages.WAITING = shelves[name]
            leaf, probs = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
            resident = peak_bytes(reset=True) if turn == 1 - before else 0
            dist.barrier()
            start = time.perf_counter()
            out = steps[name](leaf, ids[rank], probs)
            out.backward(d_out)
            took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            if turn == 1 - before:
                peaks[name] = peak_bytes(reset=False) - resident
                results[name] = (out.detach(), leaf.grad)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            if turn >= 0:
                seconds[name].append(float(took))
            del out, leaf
        check_alike(results)
    peak = torch.tensor([float(peaks[name]) for name in seconds])
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    sent = {name: sent_bytes(name, ids, world, options) for name in seconds if name != DEEPSPEED}
    if DEEPSPEED in seconds:
        sent[DEEPSPEED] = padded_bytes(ids, world, options)
    return report(workload, world, seconds, dict(zip(seconds, peak.tolist())), sent)


def check_alike(results: dict[str, tuple[Tensor, Tensor]]) -> None:
    """All contenders computed the same."""
    first = next(iter(results.values()), None)
    for name, pair in results.items():
        for one, two in zip(first, pair):
            if not torch.allclose(one, two, atol=1e-3, rtol=1e-3):
                raise RuntimeError(f"{name} computed something else")


def sent_bytes(name: str, ids: list[Tensor], world: int, options: argparse.Namespace) -> float:
    """Bytes of rows in all four passes, by the formulas (`tests/moe/test_traffic.py` holds them to the counters)."""
    nodes = {"ranks_per_node": max(1, world // 2)} if name == "hierarchical" else {}
    sizes = {"num_experts": options.experts, "topk": options.topk, "ep": world, "tokens": options.tokens}
    return 4 * sum(traffic(name.split()[-1], **sizes, row_bytes=4 * options.hidden, routing=ids, **nodes).values())


def padded_bytes(ids: list[Tensor], world: int, options: argparse.Namespace) -> float:
    """Bytes of all four passes where every rank sends as many rows for each expert as its busiest one has anywhere."""
    capacity = max(int(torch.bincount(part.flatten(), minlength=options.experts).max()) for part in ids)
    return 4 * (world - 1) * options.experts * capacity * 4 * options.hidden


def report(workload: str, world: int, seconds: dict, peaks: dict, sent: dict) -> dict:
    """One workload's record; ratios against dedup."""
    table = {}
    for name, turns in seconds.items():
        ratios = [other / own for other, own in zip(turns, seconds["dedup"])]
        table[name] = {
            "seconds": statistics.median(turns),
            "spread": [min(turns), max(turns)],
            "ratio_to_dedup": statistics.median(ratios),
            "bytes": sent[name],
            "byte_ratio_to_dedup": sent[name] / sent["dedup"],
            "peak_bytes": peaks[name],
        }
    return {"workload": workload, "ranks": world, "contenders": table}


def show(found: dict) -> None:
    """Print one workload's figures."""
    print(f"\n{found['workload']} ({WORKLOADS[found['workload']]}), {found['ranks']} ranks")
    print(f"{'':<20}{'seconds':>10}{'x dedup':>9}{'bytes x':>9}{'MiB sent':>10}{'peak MiB':>10}")
    for name, row in found["contenders"].items():
        print(
            f"{name:<20}{row['seconds']:>10.4f}{row['ratio_to_dedup']:>9.2f}{row['byte_ratio_to_dedup']:>9.2f}"
            f"{row['bytes'] / 2**20:>10.0f}{row['peak_bytes'] / 2**20:>10.0f}",
            flush=True,
        )


def keep(found: dict, options: argparse.Namespace) -> None:
    """Add one workload's figures to the file, in place of those of the same workload and ranks."""
    if not options.out:
        return
    what = "dispatch and combine, forward and backward: " + ", ".join(
        f"{key}={getattr(options, key)}" for key in ("tokens", "hidden", "experts", "topk", "turns", "other_turns")
    )
    question = (found["workload"], found["ranks"])
    rows = [row for row in record.kept(options.out, what) if (row["workload"], row["ranks"]) != question]
    record.write(options.out, what, [*rows, found])


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--other-turns", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", default=["W0"], choices=WORKLOADS)
    parser.add_argument("--no-rivals", dest="rivals", action="store_false")
    parser.add_argument("--out", type=Path, help="file of figures, written after every workload")
    options = parser.parse_args()
    for world in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(worker, args=(world, f"{folder}/store", options), nprocs=world)


if __name__ == "__main__":
    main()

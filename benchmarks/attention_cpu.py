"""Attention over ranks on a CPU: share of the ideal, beside torch's own ring, both in one run.

    python -m benchmarks.attention_cpu [--ranks 2] [--lengths 2048 8192] [--out benchmarks/results/attention_cpu.json]

ideal    one process, one thread, the whole sequence through torch's CPU flash operator, divided by the ranks
peers    torch's private ring (`_templated_ring_attention`, all-to-all), zigzag halves, the same operator inside; DeepSpeed's
         Ulysses and picotron's ring where they are installed
Each turn times every contender once, one after another, each turn another one first. Figures are medians over the turns, of
the slowest rank, and of ratios within a turn. Longer sequences have fewer turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.attention_peers import DIM, HEADS, PEERS, installed, ours, single
from benchmarks.record import write


def rank_main(
    rank: int, world: int, store: str, lengths: list[int], turns: int, masks: list[str], peers: list[str], answers: str
) -> None:
    """One rank: every contender in turn, the single process on rank 0 alone."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    group, results = dist.group.WORLD, {}
    for length in lengths:
        for causal in (mask == "causal" for mask in masks):
            contenders = {
                "tokenring, auto": ours(length, causal, group, "auto", "auto"),
                "tokenring, auto, prepared": ours(length, causal, group, "auto", "auto", prepared=True),
                "tokenring, ring": ours(length, causal, group, "ring", "ring:direct"),
                "tokenring, tokenring": ours(length, causal, group, "tokenring", "tokenring"),
                **{name: make(length, causal, group) for name, make in installed().items() if name in peers},
            }
            times: dict[str, list[float]] = {name: [] for name in ("single", *contenders)}
            alone = single(length, causal)
            for turn in range(max(3, turns * lengths[0] // length) + 2):
                spent = {"single": timed(alone) if rank == 0 else 0.0}
                names = list(contenders)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    dist.barrier()
                    spent[name] = timed(contenders[name])
                slowest = torch.tensor([spent[name] for name in times])
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                for name, seconds in zip(times, slowest.tolist()):
                    times[name] += [seconds] if turn >= 2 else []
            results[f"{length} {'causal' if causal else 'full'}"] = summary(times, world)
    if rank == 0:
        Path(answers).write_text(json.dumps(results))
    dist.destroy_process_group()


def timed(call: Callable[[], None]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def summary(times: dict[str, list[float]], world: int) -> dict:
    """Medians, and the share of the ideal: paired turn by turn, because the machine is noisy."""
    ideal = [t / world for t in times["single"]]
    return {
        name: {
            "seconds": statistics.median(seconds),
            "share_of_ideal": statistics.median(i / s for i, s in zip(ideal, seconds)),
            "speed_up_over": {
                peer: statistics.median(t / s for t, s in zip(times[peer], seconds)) for peer in PEERS if peer in times
            },
        }
        for name, seconds in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--masks", nargs="+", default=["causal", "full"], choices=("causal", "full"))
    parser.add_argument("--peers", nargs="+", default=list(installed()), choices=list(PEERS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        answers = f"{folder}/answers.json"
        arguments = (
            options.ranks,
            f"{folder}/store",
            options.lengths,
            options.turns,
            options.masks,
            options.peers,
            answers,
        )
        mp.spawn(rank_main, arguments, nprocs=options.ranks)
        results = json.loads(Path(answers).read_text())
    for case, rows in results.items():
        print(f"\n{case}, {options.ranks} ranks x 1 thread, {HEADS} heads, head dim {DIM}, float32, forward + backward")
        for name, row in rows.items():
            print(
                f"  {name:<26} {row['seconds'] * 1e3:8.1f} ms   {row['share_of_ideal']:6.1%} of ideal   "
                + "   ".join(f"{times:5.2f} x {peer}" for peer, times in row["speed_up_over"].items())
            )
    if options.out:
        write(options.out, f"attention over {options.ranks} ranks of one thread each, forward and backward", results)


if __name__ == "__main__":
    main()

"""Attention over ranks on a CPU: share of the ideal, beside torch's own ring, both in one run.

    python benchmarks/attention_cpu.py [--ranks 2] [--lengths 2048 8192] [--out benchmarks/results/attention_cpu.json]

ideal    one process, one thread, the whole sequence through torch's CPU flash operator, divided by the ranks
peers    torch's private ring (`_templated_ring_attention`, all-to-all), zigzag halves, the same operator inside
Each turn times every contender once, one after another; figures are medians over the turns, of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import tokenring as tr

HEADS, DIM = 8, 64


def single(length: int, causal: bool) -> Callable[[], None]:
    """The whole sequence on this process: forward and backward through the flash operator."""
    q, k, v, grad = (torch.randn(1, HEADS, length, DIM) for _ in range(4))
    flash = torch.ops.aten

    def call() -> None:
        out, lse = flash._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        flash._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)

    return call


def ours(
    length: int, causal: bool, group: dist.ProcessGroup, schedule: str, backward: str, prepared: bool
) -> Callable[[], None]:
    """tokenring.attention, forward and backward."""
    world, rank = group.size(), group.rank()
    layout = tr.Layout.zigzag(length, world)
    rows = layout.length(rank)
    q, k, v = (torch.randn(1, rows, HEADS, DIM, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, rows, HEADS, DIM)
    mask = "causal" if causal else "full"
    shape = tr.AttentionShape(1, length, length, HEADS, HEADS, DIM, dtype=torch.float32)
    plan = tr.plan(schedule, world=world, shape=shape, layout=layout, mask=mask)
    if prepared:
        tr.prepare(group, plan)
        options = {"plan": plan}
    else:
        options = {"layout": layout, "mask": mask, "schedule": schedule}

    def call() -> None:
        out = tr.attention(q, k, v, group=group, backward_schedule=backward, **options)
        torch.autograd.grad(out, (q, k, v), grad)

    return call


def torch_ring(length: int, causal: bool, group: dist.ProcessGroup) -> Callable[[], None]:
    """torch's ring with keys and values by all-to-all, the rank's zigzag halves."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp

    cp.set_rotate_method("alltoall")
    cp._cp_options.enable_load_balance = causal
    rows = length // group.size()
    q, k, v, grad = (torch.randn(1, HEADS, rows, DIM) for _ in range(4))
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def call() -> None:
        out, lse = cp._templated_ring_attention(group, 2, forward, q, k, v, is_causal=causal)[:2]
        cp._templated_ring_attention_backward(
            group, 2, backward, grad, "grad_out", q, k, v, out, lse, causal, dropout_p=0.0
        )

    return call


def rank_main(rank: int, world: int, store: str, lengths: list[int], turns: int, answers: str) -> None:
    """One rank: every contender in turn, the single process on rank 0 alone."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    group, results = dist.group.WORLD, {}
    for length in lengths:
        for causal in (True, False):
            contenders = {
                "ring": ours(length, causal, group, "ring", "ring:direct", False),
                "ring, prepared": ours(length, causal, group, "ring", "ring:direct", True),
                "tokenring": ours(length, causal, group, "tokenring", "tokenring", False),
                "torch ring": torch_ring(length, causal, group),
            }
            times: dict[str, list[float]] = {name: [] for name in ("single", *contenders)}
            alone = single(length, causal)
            for turn in range(turns + 2):
                spent = {"single": timed(alone) if rank == 0 else 0.0}
                for name, call in contenders.items():
                    dist.barrier()
                    spent[name] = timed(call)
                slowest = torch.tensor(list(spent.values()))
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                for name, seconds in zip(spent, slowest.tolist()):
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
            "times_torch_ring": statistics.median(t / s for t, s in zip(times["torch ring"], seconds)),
        }
        for name, seconds in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        answers = f"{folder}/answers.json"
        arguments = (options.ranks, f"{folder}/store", options.lengths, options.turns, answers)
        mp.spawn(rank_main, arguments, nprocs=options.ranks)
        results = json.loads(Path(answers).read_text())
    for case, rows in results.items():
        print(f"\n{case}, {options.ranks} ranks x 1 thread, {HEADS} heads, head dim {DIM}, float32, forward + backward")
        for name, row in rows.items():
            print(
                f"  {name:<16} {row['seconds'] * 1e3:8.1f} ms   {row['share_of_ideal']:6.1%} of ideal   "
                f"{row['times_torch_ring']:5.2f} x torch ring"
            )
    if options.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        record = {"kind": "measured", "date": str(date.today()), "commit": commit, "torch": torch.__version__}
        record |= {"hardware": f"{torch.get_num_threads()} CPU threads of {sys.platform}", "ranks": options.ranks}
        options.out.write_text(json.dumps(record | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

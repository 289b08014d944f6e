"""Attention over ranks that are played in one process on one device, beside torch's flash attention of the whole sequence.

    python -m benchmarks.attention_gpu [--lengths 32768 131072] [--worlds 4 8] [--out benchmarks/results/attention_gpu.json]

All ranks share the device, so together they do the work of one: the share of the ideal is the single call's time over the time
until every rank has its result. What is missing from 100% is smaller kernel calls, merges, copies between the ranks' buffers
and the host's part. The merges' own time on the device is read from a profile. No link is measured here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import tokenring as tr
from benchmarks.record import write

HEADS, KV_HEADS, DIM = 32, 8, 128
SCHEDULES = ("ring", "biring", "tokenring", "gather", "mesh", "ulysses")


class Case:
    """One length and mask on a device: the tensors that every contender cuts."""

    def __init__(self, length: int, mask: str, device: str, dtype: torch.dtype) -> None:
        self.length, self.mask, self.device, self.dtype = length, mask, device, dtype
        make = torch.Generator(device).manual_seed(length)
        self.q, self.k, self.v, self.grad = (
            torch.randn(1, length, heads, DIM, generator=make, device=device, dtype=dtype)
            for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
        )

    def single(self, backward: bool) -> Callable[[], Any]:
        """torch's attention of the whole sequence."""
        q, k, v = (x.transpose(1, 2).detach().requires_grad_(backward) for x in (self.q, self.k, self.v))

        def call() -> Any:
            out = scaled_dot_product_attention(q, k, v, is_causal=self.mask == "causal", enable_gqa=True)
            return torch.autograd.grad(out, (q, k, v), self.grad.transpose(1, 2)) if backward else out

        return call

    def over_ranks(self, world: int, schedule: str, backward: bool) -> Callable[[], Any]:
        """All ranks of a schedule, as threads; each takes the same plan."""
        layout = (
            tr.Layout.zigzag(self.length, world) if self.mask == "causal" else tr.Layout.contiguous(self.length, world)
        )
        shards = [[layout.shard(x, rank) for x in (self.q, self.k, self.v, self.grad)] for rank in range(world)]

        def rank_call(group: Any) -> Any:
            *tensors, grad = shards[group.rank()]
            q, k, v = (x.detach().requires_grad_(backward) for x in tensors)
            out = tr.attention(
                q, k, v, group=group, layout=layout, mask=self.mask, schedule=schedule, backward_schedule=schedule
            )
            return torch.autograd.grad(out, (q, k, v), grad) if backward else out

        return lambda: tr.run_local(world, rank_call)


def seconds(calls: dict[str, Callable[[], Any]], turns: int, device: str) -> dict[str, list[float]]:
    """All calls in turn, so that a drift of clocks falls on all of them; the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            times[name] += [time.perf_counter() - start] if turn else []
    return times


def merging(call: Callable[[], Any], device: str) -> float | None:
    """Seconds that merge kernels spend on the device in one call; None where the device has none of its own."""
    if device == "cpu":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        synchronize(device)
    return sum(event.self_device_time_total for event in profiled.key_averages() if "merge" in event.key) / 1e6


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def measure(options: argparse.Namespace) -> list[dict]:
    """A row for each length, mask, direction, world and schedule."""
    rows, dtype = [], getattr(torch, options.dtype)
    for length in options.lengths:
        for mask in options.masks:
            case = Case(length, mask, options.device, dtype)
            for backward in (False, True):
                calls = {"single": case.single(backward)}
                for world in options.worlds:
                    names = [f"mesh:2x{world // 2}" if s == "mesh" else s for s in options.schedules]
                    calls |= {f"{s} / {world}": case.over_ranks(world, s, backward) for s in names}
                times = seconds(calls, options.turns, options.device)
                for name, call in calls.items():
                    share = statistics.median(a / b for a, b in zip(times["single"], times[name]))
                    what = "forward + backward" if backward else "forward"
                    merge = None if name == "single" else merging(call, options.device)
                    rows.append(
                        {"length": length, "mask": mask, "what": what, "contender": name, "merge_seconds": merge}
                    )
                    rows[-1] |= {"seconds": statistics.median(times[name]), "share_of_ideal": share}
                    merged = "" if merge is None else f"   merging {merge * 1e3:7.2f} ms"
                    print(
                        f"{length:>7} {mask:<7} {what:<19} {name:<18} {rows[-1]['seconds'] * 1e3:9.2f} ms   {share:6.1%}{merged}",
                        flush=True,
                    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--worlds", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--masks", nargs="+", default=["causal"], choices=("causal", "full"))
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = measure(options)
    if options.out:
        told = {"dtype": options.dtype, "heads": [HEADS, KV_HEADS], "dim": DIM}
        if options.device != "cpu":
            told["gpu"] = torch.cuda.get_device_name()
        write(options.out, "attention over the ranks of one device", rows, **told)


if __name__ == "__main__":
    main()

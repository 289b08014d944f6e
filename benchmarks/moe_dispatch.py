"""Dispatch and combine, forward and backward, on CPUs over gloo: our dispatchers beside Megatron-Core's, in one run.

    python benchmarks/moe_dispatch.py [--ranks 4 8] [--workloads W0] [--out benchmarks/results/moe_dispatch.json]

Experts are the identity, and already weighted, on both sides. Every turn times each contender once, one after another; a
turn's time is that of its slowest rank; figures are medians over turns, ratios are medians of the turns' ratios. Bytes are
the rows that left all ranks. Memory is what a step adds at most to a process, the largest of the ranks.

Megatron-Core's dispatchers expect a GPU. Here, and only here, four CUDA calls are answered on the CPU, and split sizes become
lists (`cpu_shim`); their code is untouched. Megatron-Core 0.16.1's alltoall refuses uneven gloo gathers, so ETP stays 1.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date, timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from moe import build_dispatcher, traffic
from moe.workloads import WORKLOADS, routing

OURS = ("dedup", "hierarchical", "alltoall", "allgather")
THEIRS = ("megatron alltoall", "megatron allgather")


def ours(name: str, group: dist.ProcessGroup, options: argparse.Namespace) -> Callable[..., Tensor]:
    """One of our dispatchers on the whole group as EP."""
    nodes = {"ranks_per_node": max(1, group.size() // 2)} if name == "hierarchical" else {}
    d = build_dispatcher(name, num_experts=options.experts, ep_group=group, **nodes)

    def step(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sent = d.dispatch(hidden, ids, weights)
        return d.combine(sent.tokens, sent, weighted=True)

    return step


def cpu_shim() -> None:
    """Answer the CUDA calls on the way of Megatron-Core's dispatchers, and turn its split sizes into lists."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    class Stream:
        def wait_stream(self, other: object) -> None: ...

        def synchronize(self) -> None: ...

        def record_event(self) -> Stream:
            return self

    plain = mappings.all_to_all

    def all_to_all(group: object, x: Tensor, output_splits: object = None, input_splits: object = None) -> Tensor:
        as_list = [s.tolist() if isinstance(s, Tensor) else s for s in (output_splits, input_splits)]
        return plain(group, x, *as_list)

    parallel_state._set_global_memory_buffer()
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.Stream = Stream
    torch.cuda.current_stream = Stream
    torch.cuda.stream = lambda stream: nullcontext()
    token_dispatcher.all_to_all = all_to_all


def megatron(name: str, group: dist.ProcessGroup, options: argparse.Namespace) -> Callable[..., Tensor]:
    """One of Megatron-Core's dispatchers on the whole group as EP."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import token_dispatcher as theirs
    from megatron.core.transformer.transformer_config import TransformerConfig

    kind = {"alltoall": theirs.MoEAlltoAllTokenDispatcher, "allgather": theirs.MoEAllGatherTokenDispatcher}[name]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=options.hidden,
        num_attention_heads=1,
        num_moe_experts=options.experts,
        moe_router_topk=options.topk,
        expert_model_parallel_size=group.size(),
        add_bias_linear=False,
    )
    pgs = ProcessGroupCollection()
    alone = options.alone
    pgs.ep, pgs.expt_tp, pgs.tp_ep, pgs.tp = group, alone, group, alone
    local = options.experts // group.size()
    mine = list(range(group.rank() * local, (group.rank() + 1) * local))
    d = kind(local, mine, config=config, pg_collection=pgs)

    def step(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        probs = hidden.new_zeros(hidden.shape[0], options.experts).scatter(1, ids, weights)
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(1, ids, True)
        tokens, probs = d.token_dispatch(*d.dispatch_preprocess(hidden.unsqueeze(1), chosen, probs))
        tokens, _, _ = d.dispatch_postprocess(tokens, probs)
        return d.combine_postprocess(d.token_combine(d.combine_preprocess(tokens))).squeeze(1)

    return step


def peak_bytes(reset: bool) -> int:
    """Resident high-water mark of this process; `reset` makes it start from here."""
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def worker(rank: int, world: int, store: str, options: argparse.Namespace, results: str) -> None:
    """One rank: all contenders on all workloads."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    group = dist.group.WORLD
    singles = [dist.new_group([r]) for r in range(world)]
    options.alone = singles[rank]
    steps = {name: ours(name, group, options) for name in OURS}
    if options.megatron:
        cpu_shim()
        steps |= {name: megatron(name.split()[1], group, options) for name in THEIRS}
    records = []
    for workload in options.workloads:
        records.append(run_workload(workload, steps, group, options))
    if rank == 0:
        Path(results).write_text(json.dumps(records))
    dist.barrier()
    dist.destroy_process_group()


def run_workload(
    workload: str, steps: dict[str, Callable[..., Tensor]], group: dist.ProcessGroup, options: argparse.Namespace
) -> dict:
    """Times of every turn, peak memory and bytes of every contender."""
    rank, world = group.rank(), group.size()
    ragged = workload == "W4"
    seconds: dict[str, list[float]] = {name: [] for name in steps if not (ragged and name.startswith("megatron"))}
    peaks = dict.fromkeys(seconds, 0)
    for turn in range(-options.warmup, options.turns):
        ids = routing(workload, options.tokens, options.experts, options.topk, world, seed=1, step=max(turn, 0))
        draw = torch.Generator().manual_seed(rank)
        n = ids[rank].shape[0]
        hidden, d_out = (torch.randn(n, options.hidden, generator=draw) for _ in range(2))
        weights = torch.rand(n, options.topk, generator=draw)
        results = {}
        for name in seconds:
            leaf, probs = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
            before = peak_bytes(reset=True) if turn == -1 else 0
            dist.barrier()
            start = time.perf_counter()
            out = steps[name](leaf, ids[rank], probs)
            out.backward(d_out)
            took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            if turn == -1:
                peaks[name] = peak_bytes(reset=False) - before
                results[name] = (out.detach(), leaf.grad)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            if turn >= 0:
                seconds[name].append(float(took))
            del out, leaf
        check_alike(results)
    peak = torch.tensor([float(peaks[name]) for name in seconds])
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    sent = {name: sent_bytes(name, ids, world, options) for name in seconds}
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


def show(record: dict) -> None:
    """Print one record."""
    print(f"\n{record['workload']} ({WORKLOADS[record['workload']]}), {record['ranks']} ranks")
    print(f"{'':<20}{'seconds':>10}{'x dedup':>9}{'bytes x':>9}{'MiB sent':>10}{'peak MiB':>10}")
    for name, row in record["contenders"].items():
        print(
            f"{name:<20}{row['seconds']:>10.4f}{row['ratio_to_dedup']:>9.2f}{row['byte_ratio_to_dedup']:>9.2f}"
            f"{row['bytes'] / 2**20:>10.0f}{row['peak_bytes'] / 2**20:>10.0f}"
        )


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--workloads", nargs="+", default=["W0"], choices=WORKLOADS)
    parser.add_argument("--no-megatron", dest="megatron", action="store_false")
    parser.add_argument("--out")
    options = parser.parse_args()
    records = []
    for world in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            results = f"{folder}/results.json"
            mp.spawn(worker, args=(world, f"{folder}/store", options, results), nprocs=world)
            records += json.loads(Path(results).read_text())
    for record in records:
        show(record)
    if options.out:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout
        about = {
            "date": str(date.today()),
            "commit": commit.strip(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }
        sizes = {key: getattr(options, key) for key in ("tokens", "hidden", "experts", "topk", "turns")}
        Path(options.out).write_text(json.dumps({"about": about, "sizes": sizes, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Does dispatcher "auto" pick what is fastest? The links are probed, auto models and picks, then every dispatcher is timed there.

    python -m benchmarks.moe_auto [--groups loopback:2 loopback:4] [--tokens 64 2048] [--topk 8] [--out benchmarks/results/moe_auto.json]
    python -m benchmarks.moe_auto --groups mesh:2@200 nodes:2x2@800 --tokens 512 --topk 2 8                    (root, Linux)

Groups: ranks over loopback; or, each in a network namespace of its own (`benchmarks.linklab`), over links of a set rate in
Mbit/s: two ranks with a link between them, or two nodes of two whose uplinks have a quarter of the rate inside. Dispatch and
combine, forward and backward, experts the identity. Dispatchers take turns and are first in turn, for about `--seconds` a case; a
turn's time is that of its slowest rank; figures are medians over turns. `alltoall`, which auto never considers, is timed too.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks import record
from benchmarks.moe_dispatch import check_alike
from moe import build_dispatcher
from moe.dispatch import Dispatcher
from moe.workloads import routing
from tokenring.topology import Topology

HIDDEN, EXPERTS = 1024, 64
LEAST_TURNS = 5
Case = tuple[int, int]
"""Tokens of a rank, and k."""
Batch = tuple[Tensor, Tensor, Tensor]


def judged(rank: int, world: int, per_node: int | None, cases: list[Case], seconds: float) -> list[dict]:
    """A probe, and for each case what auto modelled and chose, and every dispatcher's seconds in every turn."""
    group = dist.group.WORLD
    topology, found = Topology.probe(group), []
    if per_node is None and topology.intra is not None:
        per_node = topology.intra.world  # nodes that the probe found, as auto takes them
    options = {"num_experts": EXPERTS, "ep_group": group, "ranks_per_node": per_node}
    names = ["dedup", "allgather", *(["hierarchical"] if per_node else []), "alltoall"]
    for tokens, topk in cases:
        draw = torch.Generator().manual_seed(rank)
        ids = routing("W0", tokens, EXPERTS, topk, world, seed=1)[rank]
        batch = (torch.randn(tokens, HIDDEN, generator=draw), ids, torch.rand(tokens, topk, generator=draw))
        auto = build_dispatcher("auto", topology=topology, **options)
        steps = {name: partial(step, build_dispatcher(name, **options), batch) for name in names}
        check_alike({name: call() for name, call in {"auto": partial(step, auto, batch), **steps}.items()})
        found.append(
            {"tokens": tokens, "topk": topk, "modelled": auto.seconds, "chosen": auto.chosen.name}
            | {"runs": timed(steps, seconds), "topology": topology.to_dict()}
        )
    return found


def step(d: Dispatcher, batch: Batch) -> tuple[Tensor, Tensor]:
    """Dispatch and combine, forward and backward."""
    hidden, weights = batch[0].requires_grad_(), batch[2].requires_grad_()
    hidden.grad = weights.grad = None
    sent = d.dispatch(hidden, batch[1], weights)
    out = d.combine(sent.tokens, sent, weighted=True)
    out.backward(torch.ones_like(out))
    return out.detach(), hidden.grad


def timed(steps: dict[str, Callable[[], object]], budget: float) -> dict[str, list[float]]:
    """Seconds of the slowest rank, turn by turn; as many turns on every rank."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names, turn = list(steps), 0
    while turn < LEAST_TURNS or sum(map(sum, seconds.values())) < budget:
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            dist.barrier()
            start = time.perf_counter()
            steps[name]()
            took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            seconds[name].append(float(took))
        turn += 1
    return seconds


def over_loopback(world: int, *task: object) -> list[dict]:
    """`judged` on ranks of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_loopback_rank, args=(world, folder, task), nprocs=world)
        return torch.load(f"{folder}/found")


def _loopback_rank(rank: int, world: int, folder: str, task: tuple) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit)
    found = judged(rank, world, *task)
    if rank == 0:
        torch.save(found, f"{folder}/found")
    dist.barrier()
    dist.destroy_process_group()


def over_lab(wiring: str, world: int, mbit: float, *task: object) -> list[dict]:
    """`judged` on ranks in network namespaces."""
    from benchmarks import moe_auto as jobs  # by this name the ranks find its functions
    from benchmarks.linklab.crew import hire
    from benchmarks.linklab.lab import build
    from benchmarks.linklab.wiring import wire

    with build(wire(wiring, world, mbit)) as lab, hire(lab) as crew:
        return crew.run(jobs.judged, *task)[0]


def group_of(text: str) -> tuple[Callable[..., list[dict]], int | None]:
    """What runs a task on the ranks of a group that is named so, and its ranks per node.

    >>> group_of("loopback:4")[1], group_of("nodes:2x2@800")[1]
    (None, 2)
    """
    name, _, rate = text.partition("@")
    kind, _, size = name.partition(":")
    if kind == "loopback" and size.isdigit():
        return partial(over_loopback, int(size)), None
    if kind in ("mesh", "switch", "bus", "ring") and size.isdigit() and rate:
        return partial(over_lab, kind, int(size), float(rate)), None
    if kind == "nodes" and rate:
        nodes, per_node = map(int, size.split("x"))
        return partial(over_lab, name, nodes * per_node, float(rate)), per_node
    raise ValueError(f"group is {text!r}; give loopback:RANKS, mesh:RANKS@MBIT or nodes:COUNTxSIZE@MBIT")


def row_of(group: str, found: dict) -> dict:
    """One case's record."""
    runs = found.pop("runs")
    medians = {name: statistics.median(times) for name, times in runs.items()}
    chosen, fastest = found["chosen"], min(medians, key=medians.__getitem__)
    ratios = [own / best for own, best in zip(runs[chosen], runs[fastest])]
    spread = {name: [min(times), max(times)] for name, times in runs.items()}
    return {"group": group, **found, "fastest": fastest} | {
        "turns": len(ratios),
        "chosen_over_fastest": statistics.median(ratios),
        "seconds": medians,
        "spread": spread,
    }


def show(row: dict) -> None:
    """Print one case."""
    print(f"\n{row['group']}, {row['tokens']} tokens a rank, k = {row['topk']}: links found: {row['topology']['kind']}")
    for name, seconds in row["seconds"].items():
        modelled = row["modelled"].get(name)
        model = "" if modelled is None else f"modelled {1e3 * modelled:9.2f} ms"
        marks = [word for word, which in (("chosen", row["chosen"]), ("fastest", row["fastest"])) if which == name]
        print(f"  {name:<13}{1e3 * seconds:9.2f} ms   {model:<22} {', '.join(marks)}")
    print(f"  chosen / fastest {row['chosen_over_fastest']:.2f}", flush=True)


def main() -> None:
    """Run every group and case, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--groups", nargs="+", default=["loopback:2", "loopback:4"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 2048])
    parser.add_argument("--topk", type=int, nargs="+", default=[8])
    parser.add_argument("--seconds", type=float, default=8.0, help="for each case, about")
    parser.add_argument("--out", type=Path, help="file of figures, written after every group")
    options = parser.parse_args()
    what = f"auto's choice and every dispatcher's time, forward and backward: hidden={HIDDEN}, experts={EXPERTS}"
    for group in options.groups:
        run, per_node = group_of(group)
        cases = list(itertools.product(options.tokens, options.topk))
        rows = [row_of(group, found) for found in run(per_node, cases, options.seconds)]
        for row in rows:
            show(row)
        if options.out:
            fresh = {(row["group"], row["tokens"], row["topk"]) for row in rows}
            kept = [r for r in record.kept(options.out, what) if (r["group"], r["tokens"], r["topk"]) not in fresh]
            record.write(options.out, what, [*kept, *rows])


if __name__ == "__main__":
    main()

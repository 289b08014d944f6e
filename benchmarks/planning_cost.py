"""What planning costs: seconds of one rank's plan for every layout x mask x schedule, in large worlds.

    python -m benchmarks.planning_cost [--worlds 64 1024] [--tokens 4096] [--schedules ring gather] [--out FILE]

Seconds are of processor time. Each case runs in a process of its own with empty caches, and stops after `--limit` seconds:

    layout   cutting the positions                     plan    `tr.plan`: a named schedule, nothing built yet
    rank     `steps`, `operations` and `bytes_sent` of one rank      again   microseconds of the same `tr.plan` once more
    tiles    of that rank                              checked `plan.check()` over all ranks, up to `--check-world`

Nothing here depends on links or devices: one core of the host does it all.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import torch

import tokenring as tr
from benchmarks.record import write

LAYOUTS = ("contiguous", "zigzag", "striped", "striped(16)", "balanced")
MASKS = ("causal", "full", "window", "documents:128", "documents:5000")
SCHEDULES = ("ring", "biring", "tokenring", "gather", "mesh", "ulysses", "usp", "hybrid")
Q_HEADS, KV_HEADS, DIM = 128, 8, 128
REPEATS = 20_000


def mask_of(kind: str, length: int) -> tr.Mask:
    """A window of 4096, or documents of uneven lengths: the logarithms of their lengths are spread evenly over 1 to 1000."""
    if not kind.startswith("documents"):
        return tr.Mask.window(4096) if kind == "window" else tr.Mask.of(kind)
    draw = random.Random(7)
    weights = [1000 ** draw.random() for _ in range(int(kind.split(":")[1]))]
    scale = length / sum(weights)
    return tr.Mask.documents([0, *(int(w * scale) for w in accumulate(weights[:-1])), length])


def layout_of(kind: str, mask: tr.Mask, length: int, world: int) -> tr.Layout:
    if kind == "balanced":
        return tr.Layout.balanced(mask, length, world)
    if kind == "striped(16)":
        return tr.Layout.striped(length, world, block=16)
    return getattr(tr.Layout, kind)(length, world)


def schedule_of(kind: str, world: int) -> str:
    """The schedule's name with numbers that fit a world that is a power of two."""
    side = 1 << (world.bit_length() - 1) // 2
    node = min(8, world)
    shaped = {"mesh": f"mesh:{side}x{world // side}", "usp": f"usp:{node}x{world // node}"}
    return shaped.get(kind, f"hybrid:ring/tokenring@{node}" if kind == "hybrid" else kind)


def timed(work: Callable[[], object]) -> tuple[float, object]:
    start = time.process_time()
    done = work()
    return time.process_time() - start, done


def measure(case: tuple, options: argparse.Namespace) -> dict:
    """One case, in a fresh process."""
    world, layout_kind, mask_kind, kind = case
    length, rank = world * options.tokens, world // 2 - 1
    mask = mask_of(mask_kind, length)
    shape = tr.AttentionShape(1, length, length, Q_HEADS, KV_HEADS, DIM)
    row = {}
    row["layout"], layout = timed(lambda: layout_of(layout_kind, mask, length, world))
    name = schedule_of(kind, world)

    def make() -> tr.Plan:
        return tr.plan(name, world=world, shape=shape, layout=layout, mask=mask, direction=options.direction)

    row["plan"], plan = timed(make)
    row["rank"], _ = timed(lambda: (plan.steps(rank), plan.operations(rank), plan.bytes_sent(rank)))
    row["again"] = timed(lambda: [make() for _ in range(REPEATS)])[0] / REPEATS
    row["tiles"] = sum(len(c.tiles) for step in plan.steps(rank) for c in step.computes)
    row["bytes"] = plan.bytes_sent(rank)
    if world <= options.check_world:
        row["checked"], _ = timed(plan.check)
    return row


def in_process(case: tuple, options: argparse.Namespace) -> dict:
    """The case in a child of its own, which ends with its time."""
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_send, args=(there, case, options))
    child.start()
    there.close()
    try:
        row = here.recv()
    except EOFError:
        row = {"limit": options.limit}
    child.join()
    return dict(zip(("world", "layout_kind", "mask", "schedule"), case)) | row


def _send(pipe: object, case: tuple, options: argparse.Namespace) -> None:
    signal.setitimer(signal.ITIMER_PROF, options.limit)
    pipe.send(measure(case, options))


def cases(options: argparse.Namespace) -> Iterator[tuple]:
    for world in options.worlds:
        for layout in options.layouts:
            for mask in options.masks:
                for schedule in options.schedules:
                    yield world, layout, mask, schedule


def shown(row: dict) -> str:
    head = f"{row['world']:>5} {row['layout_kind']:<12} {row['mask']:<15} {row['schedule']:<10}"
    if "rank" not in row:
        return f"{head} more than {row['limit']} s"
    checked = f"{row['checked']:>9.3f}" if "checked" in row else f"{'-':>9}"
    seconds = " ".join(f"{row[key]:>8.3f}" for key in ("layout", "plan", "rank"))
    return f"{head} {seconds} {checked} {1e6 * row['again']:>9.1f} {row['tiles']:>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--tokens", type=int, default=4096, help="rows a rank")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS)
    parser.add_argument("--masks", nargs="+", default=MASKS)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES)
    parser.add_argument("--direction", choices=("forward", "backward"), default="forward")
    parser.add_argument("--check-world", type=int, default=64, help="largest world whose plans are proven")
    parser.add_argument("--limit", type=int, default=120, help="seconds of processor time that a case may take")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{'world':>5} {'layout':<12} {'mask':<15} {'schedule':<10}   layout     plan     rank   checked  again us    tiles"
    )
    rows = []
    for case in cases(options):
        rows.append(in_process(case, options))
        print(shown(rows[-1]), flush=True)
    if options.out:
        what = f"seconds of one core for one rank's plan, {options.direction}, {options.tokens} tokens a rank"
        write(options.out, what, rows)


if __name__ == "__main__":
    main()

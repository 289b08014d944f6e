"""Many items of one shape at once beside the same items one by one: what `benchmarks/token_reduction.py --batch` measures.

Both sides take turns in one process, in CPU seconds of one thread; the indices are checked to be the same. On a GPU each small
item alone would leave the device idle, so the figures of a CPU, where an item fills the core, are the least that batching gives.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.token_reduction_scale import tokens_of
from token_reduction import Budget, VisualTokens, build, methods

SHAPES = ((64, 1, 8), (48, 1, 16), (8, 4, 16))
"""Items, frames of each, and the side of a frame in tokens."""


def items_of(items: int, frames: int, side: int) -> VisualTokens:
    """Items of generated features, every channel, a text of its own each."""
    cells = side * side
    whole = tokens_of(-(-items * frames * cells // 256))
    rows = items * frames * cells
    channels = {name: value[:rows] for name, value in whole.channels.items() if name != "text"}
    chance = torch.Generator().manual_seed(1)
    channels["text"] = [torch.randn(8, whole.x.shape[1], generator=chance) for _ in range(items)]
    offsets = torch.arange(items + 1) * frames * cells
    return VisualTokens(whole.x[:rows], offsets, [(frames, side, side)] * items, whole.positions[:, :rows], channels)


def compare(name: str, tokens: VisualTokens, repeat: int) -> dict[str, Any]:
    """Median CPU seconds of both sides and of their ratios."""
    method, budget = build(name), Budget.ratio(0.1)
    alone = [tokens.item(number) for number in range(len(tokens.grid))]
    sides: tuple[list[float], list[float]] = [], []
    for _ in range(repeat):
        start = time.process_time()
        together = method.reduce(tokens, budget)
        middle = time.process_time()
        loop = [method.reduce(one, budget) for one in alone]
        sides[0].append(middle - start)
        sides[1].append(time.process_time() - middle)
    starts = tokens.cu_seqlens.tolist()
    same = torch.equal(together.index, torch.cat([r.index + s for r, s in zip(loop, starts)]))
    seconds = [statistics.median(side) for side in sides]
    ratio = statistics.median(b / a for a, b in zip(*sides))
    return {"method": name, "together": seconds[0], "one_by_one": seconds[1], "times_as_fast": ratio, "same": same}


def measure(out: Path, names: list[str], repeat: int = 3) -> None:
    """Every method but those that draw, of every shape."""
    torch.set_num_threads(1)
    rows = []
    for shape in SHAPES:
        tokens = items_of(*shape)
        for name in names or [name for name in methods() if name not in ("identity", "random")]:
            rows.append({"items": shape[0], "grid": list(tokens.grid[0])} | compare(name, tokens, repeat))
            shown = rows[-1]
            print(f"{shape} {name:18} {shown['times_as_fast']:.2f} {shown['same']}", file=sys.stderr, flush=True)
        record.write(out, "many items at once beside one by one, CPU seconds of one thread", rows)

"""An hour of video at one frame a second, 921,600 tokens to a tenth, in a stream: every method whole, in a process of its own.

What bounds a machine is processor time, of one thread; wall time stands beside it with the machine's load, which stretches it.
The camera's time (features are made as they are needed) is in the wall time and not in the processor time.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.token_reduction_scale import CELLS, HOUR, apart, tokens_of
from token_reduction import Budget, VisualTokens, build, methods, reduce_stream

WINDOW = 16
LIMITS = {"seconds": 1200, "gib": 4}


def stream(name: str, frames: int) -> dict[str, Any]:
    """One method over the whole stream. `progress` counts the reports of `reduce_stream`, one after each window."""
    torch.set_num_threads(1)
    camera, kept, reports = 0.0, 0, 0

    def runs() -> Iterator[VisualTokens]:
        nonlocal camera
        for first in range(0, frames, WINDOW):
            before = time.process_time()
            run = tokens_of(min(WINDOW, frames - first), seed=first)
            camera += time.process_time() - before
            yield run

    def progress(done: int, rows: int) -> None:
        nonlocal reports
        reports += 1
        if done * 10 // frames > (done - WINDOW) * 10 // frames:
            spent = time.process_time() - start - camera
            print(f"{name}: {done} of {frames} frames, {rows} rows, {spent:.0f} CPU s", file=sys.stderr, flush=True)

    start, clock = time.process_time(), time.perf_counter()
    for part in reduce_stream(build(name), runs(), Budget.ratio(0.1), window=WINDOW, progress=progress):
        kept += part.index.numel()
    seconds = time.process_time() - start - camera
    return {
        "method": name,
        "frames": frames,
        "tokens": frames * CELLS,
        "kept": kept,
        "window": WINDOW,
        "progress": reports,
        "cpu_seconds": seconds,
        "wall_seconds": time.perf_counter() - clock,
        "camera_cpu_seconds": camera,
        "load_average": os.getloadavg()[0],
    }


def measure(out: Path, names: list[str], frames: int = HOUR) -> None:
    """Every method but identity, or those named, one after another; the file is written after each, and what it holds of this
    commit is kept."""
    what = f"{frames} frames of {CELLS} tokens to a tenth in windows of {WINDOW}, generated features, one thread"
    rows = record.kept(out, what)
    for name in names or [name for name in methods() if name != "identity"]:
        if name in [row["method"] for row in rows]:
            continue
        row = {"method": name} | apart(stream, name, frames)
        within = "error" not in row and row["cpu_seconds"] <= LIMITS["seconds"] and row["peak_gib"] <= LIMITS["gib"]
        rows.append(row | {"within_limits": within})
        record.write(out, what, rows, limits=LIMITS)

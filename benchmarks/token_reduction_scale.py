"""Long inputs for `benchmarks/token_reduction.py`: 100,000 tokens at once, an hour in a stream, a run of the launcher."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from token_reduction import VisualTokens, methods

WIDTH, CELLS = 384, 256
ONE = """
import json, resource, sys, time, torch
from benchmarks.token_reduction_scale import {work}
print(json.dumps({work}(*json.loads(sys.argv[1])) | {{"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}}))
"""


def apart(work: str, *arguments: Any) -> dict[str, Any]:
    """`work(*arguments)` in a process of its own, with its peak memory."""
    done = subprocess.run(
        [sys.executable, "-c", ONE.format(work=work), json.dumps(arguments)], capture_output=True, text=True
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout)


def video(frames: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Frames (256, 384) of scenes of 12 that drift slowly: features with the redundancy of video, of any length."""
    chance = torch.Generator().manual_seed(seed)
    for frame in range(frames):
        if frame % 12 == 0:
            scene = torch.randn(CELLS, WIDTH, generator=chance) + 2 * torch.randn(1, WIDTH, generator=chance)
        scene = scene + 0.15 * torch.randn(CELLS, WIDTH, generator=chance)
        yield scene


def tokens_of(frames: int, seed: int = 0) -> VisualTokens:
    """Such a video with every channel."""
    x = torch.cat(list(video(frames, seed)))
    chance, n = torch.Generator().manual_seed(seed), len(x)
    channels = {
        "cls_attn": torch.rand(n, generator=chance) ** 4,
        "recv_attn": torch.rand(n, 2, generator=chance) ** 4,
        "keys": x[:, :64].contiguous(),
        "queries": x[:, 64:128].contiguous(),
        "patches": x,
        "pixels": torch.rand(n, 16, generator=chance),
        "text": torch.randn(8, WIDTH, generator=chance),
    }
    return VisualTokens(x, [0, n], [(frames, 16, 16)], torch.arange(n)[None], channels)


def at_once(name: str, frames: int) -> dict[str, Any]:
    """One selection of a tenth; seconds for each kept token beside those of a blocked cosine pass over all tokens."""
    import time

    from token_reduction import Budget, build

    tokens = tokens_of(frames)
    x, n = torch.nn.functional.normalize(tokens.x, dim=1), len(tokens.x)
    start = time.perf_counter()
    kept = build(name).reduce(tokens, Budget.ratio(0.1)).index
    seconds = time.perf_counter() - start
    passes = []
    for token in kept[:20]:
        start = time.perf_counter()
        for block in x.split(4096):
            block @ x[token]
        passes.append(time.perf_counter() - start)
    covered = [float((block @ x[kept].T).amax(1).sum()) for block in x.split(2048)] if n < 2**17 else []
    one = statistics.median(passes)
    return {
        "method": name,
        "tokens": n,
        "kept": len(kept),
        "seconds": seconds,
        "seconds_per_kept": seconds / len(kept),
        "cosine_pass_seconds": one,
        "ratio": seconds / len(kept) / one,
        "coverage": sum(covered) / n if covered else None,
    }


def hour(name: str, seconds_of_video: int = 3600, window: int = 16) -> dict[str, Any]:
    """A stream of one frame a second."""
    import time

    from token_reduction import Budget, build, reduce_stream

    def runs() -> Iterator[VisualTokens]:
        for first in range(0, seconds_of_video, window):
            yield tokens_of(min(window, seconds_of_video - first), seed=first)

    start, kept, last = time.perf_counter(), 0, 0
    for part in reduce_stream(build(name), runs(), Budget.ratio(0.1), window=window):
        kept += part.index.numel()
        if part.first_frame // 360 > last:
            last = part.first_frame // 360
            print(
                f"{name}: {part.first_frame} s of video, {time.perf_counter() - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    frames = seconds_of_video
    return {
        "method": name,
        "tokens": frames * CELLS,
        "kept": kept,
        "window": window,
        "seconds": time.perf_counter() - start,
    }


def measure(large: bool, hours: list[str] | None) -> dict[str, Any]:
    """The figures of `--scale` and `--hour` (no names: every method but identity)."""
    result: dict[str, Any] = {}
    if large:
        result["at_once"] = [apart("at_once", "divprune", 391), apart("at_once", "facility", 17)]
    if hours is not None:
        names = hours or [name for name in methods() if name != "identity"]
        result["hour"] = [apart("hour", name) for name in names]
    return result


def through_the_launcher(repeat: int = 3) -> dict[str, Any]:
    """32 frames, 8,192 visual tokens, one rank: prefill with all of them, and selection with prefill at a tenth."""
    command = [
        sys.executable,
        "-m",
        "launch",
        "run",
        "clip:bigbuckbunny",
        "--frames",
        "32",
        "--window",
        "32",
        "--nproc",
        "1",
    ]
    command += ["--max-new-tokens", "1", "--json", "--quiet", "--reduce"]
    seconds: dict[str, list[dict[str, float]]] = {"identity": [], "divprune:0.1": []}
    for _ in range(repeat):
        for spec, seen in seconds.items():
            done = subprocess.run([*command, spec], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            seen.append(json.loads(done.stdout)["seconds"])
    pairs = list(zip(seconds["identity"], seconds["divprune:0.1"]))
    together = [(few["reduce"] + few["prefill"]) / full["prefill"] for full, few in pairs]
    charged = [few["reduce"] / (full["prefill"] - few["prefill"]) for full, few in pairs]
    medians = {
        "selection_and_prefill_of_full": statistics.median(together),
        "selection_of_saved": statistics.median(charged),
    }
    return {"runs": seconds, **medians}

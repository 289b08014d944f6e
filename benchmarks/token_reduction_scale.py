"""Long inputs for `benchmarks/token_reduction.py`: 100,000 tokens at once, a run of the launcher."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from token_reduction import VisualTokens, methods

WIDTH, CELLS, HOUR = 384, 256, 3600
SPECS = {"cdpruner": "cdpruner,relevance=false"}
ONE = """
import importlib, json, resource, sys
module, work = sys.argv[1].rsplit(".", 1)
try:
    result = getattr(importlib.import_module(module), work)(*json.loads(sys.argv[2]))
except Exception as error:
    result = {"error": repr(error)}
print(json.dumps(result | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


def apart(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """`work(*arguments)` in a process of its own, with its peak memory; what it shows on standard error is seen."""
    where = f"{work.__module__}.{work.__name__}"
    done = subprocess.run([sys.executable, "-c", ONE, where, json.dumps(arguments)], stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {"error": f"the process ended with {done.returncode}"}


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
    """One selection of a tenth; seconds for each kept token beside those of a blocked cosine pass over all tokens. The selection's
    own memory is the peak less what the tokens took."""
    from token_reduction import Budget, build

    tokens = tokens_of(frames)
    x, n = torch.nn.functional.normalize(tokens.x, dim=1), len(tokens.x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    kept = build(name).reduce(tokens, Budget.ratio(0.1)).index
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
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
        "whole_process_gib": peak / 2**20,
        "selection_gib": (peak - before) / 2**20,
        "coverage": sum(covered) / n if covered else None,
    }


def on_a_clip(name: str, frames: int) -> dict[str, Any]:
    """One selection of a tenth of real features, every eighth frame of Big Buck Bunny: seconds, median of five, and coverage."""
    from benchmarks.token_reduction_data import read_every, tokens_of, vit
    from benchmarks.token_reduction_metrics import seconds_of
    from token_reduction import Budget, build

    tokens = tokens_of(vit(), read_every("bigbuckbunny", 8, frames))
    seconds, kept = seconds_of(lambda: build(name).reduce(tokens, Budget.ratio(0.1)), 5)
    x = torch.nn.functional.normalize(tokens.x, dim=1)
    coverage = float((x @ x[kept.index].T).amax(1).mean())
    return {"method": name, "tokens": len(x), "kept": len(kept.index), "seconds": seconds, "coverage": coverage}


def refusals() -> list[dict[str, str]]:
    """What every method says to the hour at once; the tokens take no memory, the refusal looks at sizes."""
    from token_reduction import Budget, build

    cells = HOUR * CELLS
    x = torch.zeros(1, WIDTH).expand(cells, WIDTH)
    tokens = VisualTokens(x, [0, cells], [(HOUR, 16, 16)], torch.zeros(1, cells, dtype=torch.int64))
    said = []
    for name in methods():
        if build(name).work(tokens.grid[0], cells // 10, WIDTH) > 0:
            bare = build(name, relevance=False) if name == "cdpruner" else build(name)
            channels = {"text": torch.ones(1, WIDTH), "cls_attn": torch.zeros(1).expand(cells)}
            whole = VisualTokens(x, [0, cells], [(HOUR, 16, 16)], tokens.positions, channels)
            try:
                bare.reduce(whole, Budget.ratio(0.1))
                said.append({"method": name, "refusal": "none"})
            except ValueError as error:
                said.append({"method": name, "refusal": str(error)})
    return said


def measure() -> dict[str, Any]:
    """The figures of `--scale`."""
    clips = ("facility", "divprune", "cdpruner")
    return {
        "at_once": [apart(at_once, "divprune", 391)],
        "on_a_clip": [apart(on_a_clip, name, 17) for name in clips],
        "refusals": refusals(),
    }


def through_the_launcher(names: list[str], repeat: int) -> dict[str, Any]:
    """32 frames, 8,192 visual tokens, one rank: prefill with all of them beside selection and prefill at a tenth, by turns."""
    command = [sys.executable, "-m", "launch", "run", "clip:bigbuckbunny", "--frames", "32", "--window", "32"]
    command += ["--nproc", "1", "--max-new-tokens", "1", "--json", "--quiet", "--reduce"]
    specs = {name: SPECS.get(name, name) + ":0.1" for name in names}
    full: list[float] = []
    few: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(repeat):
        full.append(_stages([*command, "identity"])["prefill"])
        for name, spec in specs.items():
            few[name].append(_stages([*command, spec]))
            print(f"{turn + 1}/{repeat} {name}: {few[name][-1]}, full {full[-1]:.1f} s", file=sys.stderr, flush=True)
    rows = []
    for name, runs in few.items():
        together = [(run["reduce"] + run["prefill"]) / whole for run, whole in zip(runs, full)]
        charged = [run["reduce"] / (whole - run["prefill"]) for run, whole in zip(runs, full)]
        medians = {
            "selection_and_prefill_of_full": statistics.median(together),
            "selection_of_saved": statistics.median(charged),
        }
        rows.append({"method": name, "spec": specs[name], **medians, "runs": runs})
    return {"full_prefill_seconds": full, "rows": rows}


def selections(names: list[str], prefills: tuple[float, float]) -> list[dict[str, Any]]:
    """Selection alone, in this process, on the very tokens that such a run reduces (the demo's 32 frames, 8,192 x 576, every
    channel); charged against `prefills`, measured seconds with everything and with a tenth kept."""
    from benchmarks.token_reduction_metrics import seconds_of
    from launch import assets
    from launch.models.demo import DemoAdapter
    from launch.pipeline import question_rows
    from launch.video import join, plan_frames, read
    from token_reduction import from_spec

    adapter = DemoAdapter.load(torch.float32, "cpu")
    frames = plan_frames(join([assets.find("clip:bigbuckbunny")]), count=32)
    plan = adapter.visual_plan(32, *frames.size)
    images = torch.stack([torch.from_numpy(image.copy()) for _, image in read(frames, 0, 32)])
    tokens = adapter.prepare(images, plan, channels=sorted(adapter.channels))
    rows = []
    for name in names:
        method, budget = from_spec(SPECS.get(name, name) + ":0.1")
        text = question_rows(adapter, method, "Describe the video.")
        asked = replace(tokens, channels={**tokens.channels, **({} if text is None else {"text": text})})
        seconds, kept = seconds_of(lambda m=method, b=budget, t=asked: m.reduce(t, b), 1)
        saved = prefills[0] - prefills[1]
        rows.append({"method": name, "seconds": seconds, "kept": len(kept.index), "selection_of_saved": seconds / saved,
                     "selection_and_prefill_of_full": (seconds + prefills[1]) / prefills[0]})  # fmt: skip
        print(f"{name}: {seconds:.2f} s, {100 * seconds / saved:.1f}% of what it saves", file=sys.stderr, flush=True)
    return rows


def _stages(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds = json.loads(done.stdout)["seconds"]
    return {stage: seconds[stage] for stage in ("reduce", "prefill")}

"""Every reducer on real features of real clips: quality, seconds, and what the seconds buy.

    python -m benchmarks.token_reduction [--frames 17] [--ratio 0.1] [--out FILE.json] [--readme README.md]
    python -m benchmarks.token_reduction --scale [--hour METHOD ...]     100,000 tokens, an hour of video
    python -m benchmarks.token_reduction --run                           32 frames through `tokenring run`

Baselines (identity, uniform, random, pool, downsample) always stand in the table. Methods that need text are asked with an image:
eight tokens of a crop. Selection seconds are set against the seconds a decoder of SmolLM2-135M's size saves (one layer measured,
times 30). `--readme` puts the table between the marks `<!-- token_reduction -->` and `<!-- /token_reduction -->`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import token_reduction_scale as scale
from benchmarks.token_reduction_data import CLIPS, Clip, clip, tokens_of, vit
from benchmarks.token_reduction_metrics import ocr, prefill_seconds, quality, seconds_of, text_survival, written
from token_reduction import Budget, build, methods
from token_reduction.flops import divprune_share
from token_reduction.inside import VisionDropStages, aim

OPTIONS: dict[str, dict[str, Any]] = {"vflowopt": {"heads": 6}}
MARKS = ("<!-- token_reduction -->", "<!-- /token_reduction -->")
TEXT_FRAMES = 6


def measure(name: str, clips: list[Clip], budget: Budget, saved: float) -> dict[str, Any]:
    """One method: means over clips."""
    method, rows, times = build(name, **OPTIONS.get(name, {})), [], []
    budget = Budget.ratio(1.0) if name == "identity" else budget
    for each in clips:
        seconds, reduction = seconds_of(lambda each=each: method.reduce(each.tokens, budget))
        times.append(seconds)
        rows.append(quality(each, reduction))
    row = {key: statistics.mean(r[key] for r in rows) for key in rows[0]}
    seconds = statistics.mean(times)
    about = methods()[name]
    said = {"needs": list(about.needs), "cost": about.cost, "form": about.form, "source": about.source}
    spent = None if name == "identity" else seconds / saved
    return {"method": name, **said, **row, "seconds": seconds, "spent_of_saved": spent}


def add_text(rows: list[dict[str, Any]], model: Any, frames: Any, budget: Budget) -> None:
    """Text survival of every method, on frames with words."""
    pictures, words, cells = written(frames[:TEXT_FRAMES])
    small = torch.nn.functional.interpolate(pictures.permute(0, 3, 1, 2).float(), frames.shape[1:3], mode="area")
    tokens = tokens_of(model, small.permute(0, 2, 3, 1).round().byte())
    read = ocr()
    for row in rows:
        name = row["method"]
        share = Budget.ratio(1.0) if name == "identity" else budget
        reduction = build(name, **OPTIONS.get(name, {})).reduce(tokens, share)
        row |= text_survival(pictures, words, cells, tokens, reduction, read)


def table(rows: list[dict[str, Any]], result: dict[str, Any]) -> str:
    """The table in markdown."""
    columns = [
        "method",
        "needs",
        "coverage",
        "nearest kept",
        "[CLS] mass",
        "crop finds its frame",
        "text cells",
        "words read",
    ]
    columns += ["seconds", "of what it saves", "form"]
    head = f"| {' | '.join(columns)} |"
    lines = [head, "|" + "---|" * len(columns)]
    for r in rows:
        words = "not run" if r["words_read"] is None else f"{r['words_read']:.2f}"
        spent = "-" if r["spent_of_saved"] is None else f"{100 * r['spent_of_saved']:.1f}%"
        needs = ", ".join(r["needs"]) or "-"
        lines.append(
            f"| {r['method']} | {needs} | {r['coverage']:.4f} | {r['nearest_kept']:.4f} | {r['attention_mass']:.3f} | "
            f"{r['retrieval']:.2f} | {r['text_cells']:.2f} | {words} | {r['seconds']:.2f} | {spent} | {r['form']} |"
        )
    what = f"{', '.join(result['clips'])}, {result['frames']} frames each, {100 * result['ratio']:g}% kept, means over clips"
    return "\n".join(
        [*lines, "", f"Measured: {what}; {result['hardware']}, {result['threads']} threads, commit {result['commit']}."]
    )


def published() -> list[dict[str, Any]]:
    """Published figures that are arithmetic, beside ours. Two of DivPrune's need inputs that were not published."""
    seven, thirteen = {"layers": 32, "width": 4096, "ffn": 11008}, {"layers": 40, "width": 5120, "ffn": 13824}
    stages = [48, *(a + b for a, b in VisionDropStages().stages.values())]
    return [
        {
            "what": "DivPrune, LLaVA-1.5-7B, % of FLOPs",
            "published": 15.63,
            "ours": 100 * divprune_share(576, 0.098, **seven),
        },
        {"what": "DivPrune, LLaVA-1.5-13B", "published": 15.71, "ours": 100 * divprune_share(576, 0.098, **thirteen)},
        {
            "what": "DivPrune, LLaVA-1.6-7B, 2,880 rows assumed",
            "published": 10.80,
            "ours": 100 * divprune_share(2880, 0.098, **seven),
        },
        {
            "what": "DivPrune, video, 1,152 rows, its image texts",
            "published": 14.10,
            "ours": 100 * divprune_share(1152, 0.1, **seven),
        },
        {"what": "AIM, mean share over 28 layers", "published": 0.625, "ours": aim(28).mean_share(28)},
        {"what": "VisionDrop, mean tokens", "published": 32, "ours": sum(stages) / 4},
    ]


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """The whole table."""
    model, budget = vit(), Budget.ratio(options.ratio)
    clips = [clip(model, name, options.frames, options.queries) for name in CLIPS]
    before = clips[0].tokens.x.shape[0]
    full, few = prefill_seconds(before), prefill_seconds(round(options.ratio * before))
    names = options.methods or list(methods())
    rows = []
    for name in names:
        rows.append(measure(name, clips, budget, full - few))
        print(
            f"{name:18} coverage {rows[-1]['coverage']:.4f}  {rows[-1]['seconds']:.2f} s", file=sys.stderr, flush=True
        )
    add_text(rows, model, clips[0].frames, budget)
    result = about(options) | {"clips": list(CLIPS), "frames": options.frames, "ratio": options.ratio}
    return result | {"prefill_seconds": [full, few], "rows": rows, "published": published()}


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Where and on what."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "kind": "measured",
        "hardware": cpu or platform.processor(),
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip(),
    }


def into_readme(path: Path, text: str) -> None:
    """Put the table between its marks."""
    whole = path.read_text()
    if any(whole.count(mark) != 1 for mark in MARKS):
        raise SystemExit(f"{path} needs the lines {MARKS[0]} and {MARKS[1]} once each, around the place of the table")
    first, last = whole.index(MARKS[0]) + len(MARKS[0]), whole.index(MARKS[1])
    path.write_text(whole[:first] + "\n" + text + "\n" + whole[last:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--hour", nargs="*", metavar="METHOD")
    parser.add_argument("--run", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.scale or options.hour is not None:
        result = about(options) | scale.measure(options.scale, options.hour)
    elif options.run:
        result = about(options) | scale.through_the_launcher()
    else:
        result = evaluate(options)
        text = table(result["rows"], result)
        print(text)
        if options.readme:
            into_readme(options.readme, text)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    elif options.scale or options.run or options.hour is not None:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""Every reducer on real features of real clips: quality, seconds, and what the seconds buy.

    python -m benchmarks.token_reduction [--frames 17] [--ratio 0.1] [--out FILE.json] [--readme README.md] [--pictures DIR]
    python -m benchmarks.token_reduction --scale                                100,000 tokens at once, coverage, refusals
    python -m benchmarks.token_reduction --hour [METHOD ...] --out FILE.json    an hour of video; begun again where it stopped
    python -m benchmarks.token_reduction --batch [METHOD ...] --out FILE.json   many items at once beside one by one
    python -m benchmarks.token_reduction --run [METHOD ...]                     32 frames through `tokenring run`
    python -m benchmarks.token_reduction --select [METHOD ...]                  every method's selection on that run's tokens

Baselines (identity, uniform, random, pool, downsample) always stand in the table. Methods that need text are asked with an image:
eight tokens of a crop. Text survives where OCR still reads the words on frames of which only the kept cells are shown; it needs
`pip install -e ".[ocr]"`. Selection is set, in CPU seconds of one thread, against what a decoder of SmolLM2-135M's size saves
(one layer measured, times 30). `--readme` puts the table between the marks `<!-- token_reduction -->` and
`<!-- /token_reduction -->`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import token_reduction_batch as batch
from benchmarks import token_reduction_hour as hour
from benchmarks import token_reduction_scale as scale
from benchmarks.record import measured
from benchmarks.token_reduction_data import CLIPS, Clip, clip, tokens_of, vit
from benchmarks.token_reduction_metrics import ocr, prefill_seconds, quality, seconds_of, text_survival, written
from benchmarks.token_reduction_published import published
from token_reduction import Budget, build, methods, show

BASELINES = ("identity", "uniform", "random", "pool", "downsample")
MARKS = ("<!-- token_reduction -->", "<!-- /token_reduction -->")
TEXT_RATIO = 0.25
RUN = Path(__file__).parent / "results" / "token_reduction_run.json"


def measure(name: str, clips: list[Clip], budget: Budget, saved: float) -> dict[str, Any]:
    """One method: means over clips."""
    method, rows, times = build(name), [], []
    budget = Budget.ratio(1.0) if name == "identity" else budget
    for each in clips:
        seconds, reduction = seconds_of(lambda each=each: method.reduce(each.tokens, budget), clock=time.process_time)
        times.append(seconds)
        rows.append({"clip": each.name, **quality(each, reduction), "seconds": seconds})
    means = {key: statistics.mean(r[key] for r in rows) for key in rows[0] if key != "clip"}
    about = methods()[name]
    said = {"needs": list(about.needs), "cost": about.cost, "form": about.form, "source": about.source}
    spent = None if name == "identity" else means["seconds"] / saved
    return {"method": name, **said, **means, "spent_of_saved": spent, "by_clip": rows}


def add_text(rows: list[dict[str, Any]], model: Any, frames: Any) -> None:
    """Text survival of every method at a quarter of the tokens, on frames with words."""
    pictures, words, cells = written(frames)
    small = torch.nn.functional.interpolate(pictures.permute(0, 3, 1, 2).float(), frames.shape[1:3], mode="area")
    tokens, read = tokens_of(model, small.permute(0, 2, 3, 1).round().byte()), ocr()
    for row in rows:
        name = row["method"]
        share = Budget.ratio(1.0 if name == "identity" else TEXT_RATIO)
        row |= {"words": 4 * len(frames)} | text_survival(
            pictures, words, cells, tokens, build(name).reduce(tokens, share), read
        )
        print(f"{name:18} words read {row['words_read']}", file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    """The table in markdown, with what it was measured on."""
    columns = [
        "method",
        "needs",
        "coverage",
        "nearest kept",
        "[CLS] mass",
        "crop finds frame",
        "words read",
        "CPU s",
        "of saved",
    ]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for r in result["rows"]:
        words = "not run" if r["words_read"] is None else f"{r['words_read']:.2f}"
        spent = "-" if r["spent_of_saved"] is None else f"{100 * r['spent_of_saved']:.1f}%"
        name = r["method"] + (" (ours)" if r["form"] == "ours" else "")
        lines.append(
            f"| {name} | {', '.join(r['needs']) or '-'} | {r['coverage']:.4f} | {r['nearest_kept']:.4f} | {r['attention_mass']:.3f} | "
            f"{r['retrieval']:.2f} | {words} | {r['seconds']:.2f} | {spent} |"
        )
    text = f"words: {100 * TEXT_RATIO:g}% kept, {result['rows'][0]['words']} words"
    what = f"{', '.join(result['clips'])}: {result['frames']} frames each, {100 * result['ratio']:g}% kept ({text})"
    on = f"{result['hardware']['cpu']}, {result['threads']} thread"
    return "\n".join([*lines, "", f"Measured: {what}, means over clips; {on}; commit {result['commit']}."])


def pictures(folder: Path, model: Any, clips: list[Clip], names: list[str], budget: Budget) -> None:
    """Kept tokens over frames as an animation, scores as heat where a method has any, and the account, of the first clip."""
    folder.mkdir(parents=True, exist_ok=True)
    frames, tokens = clips[0].frames, clips[0].tokens
    for name in names:
        reduction = build(name).reduce(tokens, Budget.ratio(1.0) if name == "identity" else budget)
        shown = show.kept_over_frames(frames, tokens, reduction)
        if reduction.scores is not None:
            shown = torch.cat([shown, show.heat_over_frames(frames, tokens, reduction.scores)], 2)
        show.save_animation(shown, folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(show.account(tokens, reduction) + "\n")


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """The whole table."""
    model, budget = vit(), Budget.ratio(options.ratio)
    clips = [clip(model, name, options.frames, options.queries) for name in CLIPS]
    before = clips[0].tokens.x.shape[0]
    full, few = prefill_seconds(before), prefill_seconds(round(options.ratio * before))
    names = [*BASELINES, *(n for n in options.methods or methods() if n not in BASELINES)]
    rows = []
    for name in names:
        rows.append(measure(name, clips, budget, full - few))
        print(
            f"{name:18} coverage {rows[-1]['coverage']:.4f}  {rows[-1]['seconds']:.2f} s", file=sys.stderr, flush=True
        )
    if options.pictures:
        pictures(options.pictures, model, clips, names, budget)
    if options.words:
        known = {row["method"]: row for row in json.loads(options.words.read_text())["words"]}
        rows = [row | known[row["method"]] for row in rows]
    else:
        add_text(rows, model, clips[0].frames[: options.text_frames])
    result = about() | {"clips": list(CLIPS), "frames": options.frames, "ratio": options.ratio}
    return result | {"text_ratio": TEXT_RATIO, "prefill_seconds": [full, few], "rows": rows, "published": published()}


def prefills_of(run: dict[str, Any]) -> tuple[float, float]:
    """Median seconds of a prefill with everything and with a tenth kept, from the figures of `--run`."""
    few = [seen["prefill"] for row in run["rows"] for seen in row["runs"]]
    return statistics.median(run["full_prefill_seconds"]), statistics.median(few)


def words(options: argparse.Namespace) -> dict[str, Any]:
    """Text survival alone, for a table made elsewhere at the same time."""
    model, rows = vit(), [{"method": name} for name in methods()]
    add_text(rows, model, clip(model, CLIPS[0], options.frames, 0).frames[: options.text_frames])
    return about() | {"words": rows}


def about() -> dict[str, Any]:
    """The head of a file of figures."""
    return measured() | {"threads": torch.get_num_threads()}


def into_readme(path: Path, text: str) -> None:
    """Put the table between its marks."""
    whole = path.read_text()
    if any(whole.count(mark) != 1 for mark in MARKS):
        raise SystemExit(f"{path} needs the lines {MARKS[0]} and {MARKS[1]} once each, around the place of the table")
    first, last = whole.index(MARKS[0]) + len(MARKS[0]), whole.index(MARKS[1])
    path.write_text(whole[:first] + "\n" + text + "\n" + whole[last:])


def arguments() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.token_reduction",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--frames", type=int, default=17, help="of each clip (17)")
    add("--ratio", type=float, default=0.1, help="share of the tokens that is kept (0.1)")
    add("--queries", type=int, default=32, help="crops of each clip whose frame is looked for (32)")
    add("--methods", nargs="*", metavar="METHOD", help="rows of the table besides the baselines; all unless told")
    add("--threads", type=int, help="of torch; the table, which counts CPU seconds, has 1 unless told")
    add("--out", type=Path, metavar="FILE", help="write the figures there as JSON")
    add("--readme", type=Path, metavar="FILE", help="put the table between its marks in this file")
    add(
        "--pictures",
        type=Path,
        metavar="DIR",
        help="kept tokens over frames (PNG animation) and tokens per frame (text)",
    )
    add("--text-frames", type=int, default=8, help="frames with four words each for the OCR column (8)")
    add("--only-words", action="store_true", help="the OCR column alone, for --words")
    add("--words", type=Path, metavar="FILE", help="take the OCR column from a file of --only-words")
    add(
        "--scale",
        action="store_true",
        help="100,000 tokens at once, selections of a real clip, refusals of an hour at once",
    )
    add(
        "--hour",
        nargs="*",
        metavar="METHOD",
        help="an hour of video in a stream, each method in its process; needs --out",
    )
    add("--hour-frames", type=int, default=scale.HOUR, help="frames of that hour (3600); fewer to try it")
    add("--batch", nargs="*", metavar="METHOD", help="many items at once beside one by one; needs --out")
    add(
        "--run", nargs="*", metavar="METHOD", help="32 frames through `tokenring run`: selection and prefill (divprune)"
    )
    add("--select", nargs="*", metavar="METHOD", help="every method's selection on the tokens of that run")
    add("--repeat", type=int, default=3, help="turns of --run (3)")
    return parser


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what could only fail later."""
    if (options.hour is not None or options.batch is not None) and options.out is None:
        parser.error("--hour and --batch write a file of figures; give --out FILE")
    if options.readme and options.methods:
        parser.error("--readme shows every method; leave --methods out")
    for name in (
        name for part in ("methods", "hour", "batch", "run", "select") for name in getattr(options, part) or ()
    ):
        if name not in methods():
            parser.error(f"there is no method {name!r}; methods are {', '.join(methods())}")


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    check(parser, options)
    table_only = not options.scale and options.hour is options.run is options.select is None
    if options.threads or table_only:
        torch.set_num_threads(options.threads or 1)
    if options.hour is not None:
        hour.measure(options.out, options.hour, options.hour_frames)
        return
    if options.batch is not None:
        batch.measure(options.out, options.batch)
        return
    if options.scale:
        result = about() | scale.measure()
    elif options.run is not None:
        result = about() | scale.through_the_launcher(options.run or ["divprune"], options.repeat)
    elif options.select is not None:
        names = options.select or [name for name in methods() if name != "identity"]
        prefills = prefills_of(json.loads(RUN.read_text()))
        result = about() | {
            "prefill_seconds": prefills,
            "selections": scale.selections(names, prefills),
        }
    elif options.only_words:
        result = words(options)
    else:
        result = evaluate(options)
        text = table(result)
        print(text)
        if options.readme:
            into_readme(options.readme, text)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    elif options.run is not None or "rows" not in result:
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

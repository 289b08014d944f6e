"""The main job with each schedule: is it verified, how long does it take, what does it send?

    python -m benchmarks.main_job [--ranks 4] [--repeat 3] [--out benchmarks/results/main_job.json]

Runs the demo (clip:bigbuckbunny, 32 frames, divprune:0.1, float32) with every schedule in turn, `--repeat` times round, so that a
drift of the machine falls on all of them. Only the last round is verified; times are medians of the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.record import write

SCHEDULES = ("ring", "biring", "tokenring", "gather")


def run(schedule: str, ranks: int, verify: bool) -> dict:
    """One run of the command; its JSON."""
    command = [sys.executable, "-m", "launch", "run", "clip:bigbuckbunny", "--frames", "32", "--nproc", str(ranks)]
    command += [
        "--schedule",
        schedule,
        "--max-new-tokens",
        "16",
        "--json",
        "--quiet",
        *(["--verify"] if verify else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rounds = [{s: run(s, options.ranks, verify=False) for s in SCHEDULES} for _ in range(options.repeat)]
    verified = {s: run(s, options.ranks, verify=True) for s in SCHEDULES}
    rows = []
    for schedule in SCHEDULES:
        reports = [each[schedule] for each in rounds]
        row = {"schedule": schedule, "verify": verified[schedule]["verify"]}
        for key in ("prefill", "first_token", "decode", "total"):
            row[f"{key}_seconds"] = statistics.median(r["seconds"][key] for r in reports)
        row["bytes_sent_in_all"] = sum(map(sum, reports[0]["bytes_sent"]))
        row["tokens"] = [reports[0]["tokens_before"], reports[0]["tokens_after"], len(reports[0]["generated_ids"])]
        rows.append(row)
        print(
            f"{schedule:10} prefill {row['prefill_seconds']:.2f} s, first token {row['first_token_seconds']:.2f} s, "
            f"{row['bytes_sent_in_all'] / 1e6:.0f} MB, logits within {row['verify']['max_logit_diff']:.1e}, "
            f"same tokens {row['verify']['same_tokens']}"
        )
    if options.out:
        write(options.out, f"demo on {options.ranks} ranks, medians of {options.repeat} runs", rows)


if __name__ == "__main__":
    main()

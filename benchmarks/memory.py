"""Is a rank's memory flat in the length of the video? The demo over a clip played 1, 4 and 16 times.

    python -m benchmarks.memory [--ranks 4] [--out benchmarks/results/memory.json]

Prints the largest rank's peak resident memory in each stage (the high-water mark is set back before each span of a stage).
Reading, encoding and reducing must stay flat; what follows grows with the sequence, whose length is shown beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.record import write

LOOPS = (1, 4, 16)
STAGES = ("read", "encode", "reduce", "splice", "prefill", "decode")
MIB = 1024 * 1024


def measure(loop: int, ranks: int, fps: float, spec: str) -> dict:
    """One run of the command; the peaks come from the ranks' own records."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "launch", "run", "clip:bigbuckbunny", "--loop", str(loop), "--fps", str(fps)]
        command += ["--reduce", spec, "--nproc", str(ranks), "--max-new-tokens", "4", "--schedule", "tokenring"]
        done = subprocess.run([*command, "--json", "--quiet", "--out", str(out)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        report = json.loads(done.stdout)
        records = [json.loads(path.read_text()) for path in sorted((out / "records").glob("rank-*.json"))]
    peaks = {stage: max(r["stage_peak_bytes"][stage] for r in records) / MIB for stage in STAGES}
    return {
        "times_the_clip": loop,
        "frames": report["frames"],
        "tokens_before": report["tokens_before"],
        "tokens_after": report["tokens_after"],
        "peak_mib": peaks,
        "cache_bytes_per_rank": report["cache_bytes_per_rank"],
        "seconds": report["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--fps", type=float, default=6.0)
    parser.add_argument("--reduce", default="divprune:0.02")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [measure(loop, options.ranks, options.fps, options.reduce) for loop in LOOPS]
    print(f"{'times':>5} {'frames':>6} {'tokens':>7} {'kept':>5}  " + " ".join(f"{s:>8}" for s in STAGES))
    for row in rows:
        peaks = " ".join(f"{row['peak_mib'][s]:8.0f}" for s in STAGES)
        print(
            f"{row['times_the_clip']:>5} {row['frames']:>6} {row['tokens_before']:>7} {row['tokens_after']:>5}  {peaks}"
        )
    if options.out:
        what = f"peak resident MiB of the largest of {options.ranks} ranks, {options.reduce}, {options.fps:g} frames per second"
        write(options.out, what, rows)


if __name__ == "__main__":
    main()

"""The attention benchmarks run, at sizes that tell nothing."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import attention_gpu

ROOT = Path(__file__).parents[2]


def test_ranks_on_one_device_are_set_beside_one_call() -> None:
    options = argparse.Namespace(lengths=[64], worlds=[4], masks=["causal", "full"], device="cpu", dtype="float32")
    options.schedules, options.turns = ["ring", "mesh", "ulysses"], 1
    rows = attention_gpu.measure(options)
    assert {row["contender"] for row in rows} == {"single", "ring / 4", "mesh:2x2 / 4", "ulysses / 4"}
    assert len(rows) == 2 * 2 * 4 and all(row["seconds"] > 0 and row["share_of_ideal"] > 0 for row in rows)


def test_processes_on_a_cpu_are_set_beside_peers() -> None:
    command = [sys.executable, "-m", "benchmarks.attention_cpu", "--lengths", "64", "--turns", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    assert "64 causal, 2 ranks" in shown and "64 full, 2 ranks" in shown
    for name in ("single", "tokenring, auto", "torch ring"):
        assert any(line.startswith(f"  {name}  ") and "of ideal" in line for line in shown.splitlines()), name

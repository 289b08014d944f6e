"""What the guide shows runs from top to bottom, and prints what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_guide_prints_what_it_says() -> None:
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "moe.md").read_text(), re.S))
    said = re.findall(r"print\(.*#\s*(.+)$", blocks, re.M)
    shown = subprocess.run([sys.executable, "-c", blocks], capture_output=True, text=True, check=True, cwd=ROOT)
    assert len(said) == 8 and shown.stdout.splitlines() == said


def test_the_example_runs() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = subprocess.run(
        [*torchrun, str(ROOT / "examples" / "moe_over_ranks.py")], capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "as planned" in done.stdout and "as one rank" in done.stdout

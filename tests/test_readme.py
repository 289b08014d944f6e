"""What the README shows runs, and prints what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("call", ["tr.plan(", "anchor_attention(", "build_dispatcher("])
def test_the_example_prints_what_the_readme_says(call: str) -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if call in b)
    said = re.findall(r"print\(.*#\s*(.+)$", block, re.M)
    shown = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=True)
    assert said and shown.stdout.splitlines() == said


def test_the_guide_runs_from_top_to_bottom_and_prints_what_it_says() -> None:
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "attention.md").read_text(), re.S))
    said = re.findall(r"print\(.*#\s*(.+)$", blocks, re.M)
    shown = subprocess.run([sys.executable, "-c", blocks], capture_output=True, text=True, check=True)
    assert len(said) > 4 and shown.stdout.splitlines() == said


def test_the_test_command_of_the_readme_is_what_ci_runs() -> None:
    assert "make test" in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make test")

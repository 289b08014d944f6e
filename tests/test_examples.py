"""The examples run as their first lines say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "ranks", "said"),
    [
        ("attention_over_ranks", 3, "as planned"),
        ("huggingface_over_ranks", 2, "as one rank does"),
        ("fsdp2_over_ranks", 4, "the same curve"),
        ("megatron_over_ranks", 2, "as one rank alone"),
    ],
)
def test_example(name: str, ranks: int, said: str, tmp_path: Path) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "--log-dir",
        str(tmp_path),
    ]
    done = subprocess.run([*torchrun, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout

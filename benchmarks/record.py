"""What every file of figures says beside them: how they came about, on what, when, at which commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch


def measured() -> dict:
    """The head of a file of measured figures."""
    return {
        "kind": "measured",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "load_average": os.getloadavg()},
        "platform": platform.platform(),
        "torch": torch.__version__,
    }


def write(path: Path, what: str, rows: list | dict, **more: object) -> None:
    """A file of measured figures."""
    path.write_text(json.dumps(measured() | {"what": what} | more | {"rows": rows}, indent=1) + "\n")


def kept(path: Path, what: str) -> list[dict]:
    """The rows that a file holds of the same question at the same commit: what was measured piece by piece."""
    if not path.is_file():
        return []
    before = json.loads(path.read_text())
    return before["rows"] if (before["what"], before["commit"]) == (what, _commit()) else []


def _commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=here)
    return done.stdout.strip()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()

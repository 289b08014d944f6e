"""What every file of figures says beside them: how they came about, on what, when, at which commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
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


class Table:
    """Rows of one question, written as they come; what the file holds of them, of the same commit, is not measured again."""

    def __init__(self, path: Path | None, what: str) -> None:
        """path: None to keep the rows in memory."""
        self.path, self.what = path, what
        self.rows: list[dict] = kept(path, what) if path else []

    def row(self, place: dict, measure: Callable[[], dict]) -> dict:
        """The row that says all of `place`; what `measure` adds to it where there is none."""
        for row in self.rows:
            if place.items() <= row.items():
                return row
        self.rows.append(place | measure())
        self.write()
        return self.rows[-1]

    def write(self, **more: object) -> None:
        """The file, with what follows from all rows."""
        if self.path:
            write(self.path, self.what, self.rows, **more)


def _commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=here)
    return done.stdout.strip()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()

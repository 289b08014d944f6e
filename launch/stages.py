"""Seconds, spans and peak memory of each stage of one rank.

Stages alternate (read, encode, reduce, read, ...), so their times and spans add up here, while the log shows a person only
the few phases they belong to. On Linux the kernel's high-water mark of resident memory is set back before each span, so a
stage's peak is its own and not that of what ran before it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.progress import Log

MERGE_SECONDS = 0.002
"""Spans of one stage that are less apart are drawn as one."""


class Stages:
    """The stop-watch and memory gauge of a run."""

    def __init__(self, log: Log, device: str) -> None:
        self.log, self.device = log, device
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.events: list[dict[str, Any]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Measure one span of a stage; it counts also if it fails."""
        _reset_peak(self.device)
        start = self.log.clock()
        try:
            yield
        finally:
            stop = self.log.clock()
            self.seconds[name] = self.seconds.get(name, 0.0) + stop - start
            self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), peak_bytes(self.device))
            last = self.events[-1] if self.events else None
            if last is not None and last["name"] == name and start - last["stop"] < MERGE_SECONDS:
                last["stop"] = stop
            else:
                self.events.append({"kind": "stage", "name": name, "start": start, "stop": stop})

    def add(self, recorded: list[Any]) -> None:
        """Take over events that attention recorded with `time.perf_counter`."""
        origin = time.perf_counter() - self.log.clock()
        for event in recorded:
            entry = {
                "kind": event.kind,
                "name": f"step {event.step}",
                "start": event.start - origin,
                "stop": event.stop - origin,
            }
            self.events.append(entry)


def peak_bytes(device: str) -> int:
    """High-water mark since the last reset: resident memory on the CPU, allocated memory on CUDA."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    from launch.worker import peak_resident_bytes

    return peak_resident_bytes()


def _reset_peak(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux, or not allowed: stage peaks are then those of the process so far

"""What a rank says while it works, and how that reaches a person.

    pipeline ── stage, progress, line ──► Log ──► sink:  FileSink   rank 0 of a started run appends JSON lines to a file,
                                                         Relay      which the launcher reads and shows
                                                  or:    Screen     directly, when the rank has the terminal itself
    other ranks keep their stage times and show nothing

The log is also the clock of the run: `log.seconds_per_stage()` and `log.stage_events()` are what the report shows, in
seconds since a moment all ranks share (they leave a barrier together).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

PLAIN_INTERVAL_SECONDS = 5.0


class Sink(Protocol):
    """Takes one message: `{"stage": name}`, `{"done": n, "total": m}` or `{"line": text}`."""

    def __call__(self, message: dict[str, Any]) -> None: ...


class Log:
    """What the pipeline gets.

    Args:
        sink: where messages go; None keeps the times and shows nothing.
        origin: `time.perf_counter()` of this process at the moment all ranks share.

    >>> log = Log()
    >>> log.stage("encode"); log.progress(3, 3); log.stage("reduce"); log.close()
    >>> list(log.seconds_per_stage())
    ['encode', 'reduce']
    """

    def __init__(self, sink: Sink | None = None, origin: float | None = None):
        self.origin = time.perf_counter() if origin is None else origin
        self.current: str | None = None
        self._sink = sink
        self._spans: list[tuple[str, float, float]] = []
        self._since = 0.0

    def clock(self) -> float:
        """Seconds since the shared origin."""
        return time.perf_counter() - self.origin

    def stage(self, name: str) -> None:
        """Begin a stage; the one before ends here. The same name may come again; its times add up."""
        self.close()
        self.current, self._since = name, self.clock()
        self._send({"stage": name})

    def progress(self, done: int, total: int) -> None:
        """`done` of `total` parts of the current stage are ready."""
        self._send({"done": int(done), "total": int(total)})

    def line(self, text: str) -> None:
        """A remark for the person who waits."""
        self._send({"line": " ".join(text.split())})

    def close(self) -> None:
        """End the current stage, if there is one."""
        if self.current is not None:
            self._spans.append((self.current, self._since, self.clock()))
            self.current = None

    def seconds_per_stage(self) -> dict[str, float]:
        """Seconds of each ended stage, in the order they first began."""
        seconds: dict[str, float] = {}
        for name, start, stop in self._spans:
            seconds[name] = seconds.get(name, 0.0) + stop - start
        return seconds

    def stage_events(self) -> list[dict[str, Any]]:
        """Ended stages as timeline events: `{"kind": "stage", "name", "start", "stop"}`."""
        return [{"kind": "stage", "name": name, "start": start, "stop": stop} for name, start, stop in self._spans]

    def _send(self, message: dict[str, Any]) -> None:
        if self._sink is not None:
            self._sink(message)


class FileSink:
    """Appends messages to a file, one JSON object a line, each visible to a reader at once."""

    def __init__(self, path: Path):
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def __call__(self, message: dict[str, Any]) -> None:
        self._file.write(json.dumps(message) + "\n")


class Relay:
    """Reads what a FileSink wrote, wherever it is, and passes whole lines on to a sink; `.stage` is the latest stage."""

    def __init__(self, sink: Sink | None):
        self.stage: str | None = None
        self.offset = 0
        self._sink = sink
        self._rest = b""

    def poll(self, path: Path) -> None:
        """Pass on what a local file gained since the last call."""
        if path.exists():
            with path.open("rb") as file:
                file.seek(self.offset)
                self.feed(file.read())

    def feed(self, data: bytes) -> None:
        """Pass on the whole lines of `data`; a line cut in the middle waits for its rest."""
        self.offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.stage = message.get("stage", self.stage)
            if self._sink is not None:
                self._sink(message)


class Screen:
    """Shows messages on standard error: bars on a terminal, plain lines elsewhere. Use as a context manager."""

    def __init__(self, stream: TextIO | None = None, quiet: bool = False):
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._bars: Any = None
        self._task: Any = None
        self._stage = ""
        self._shown = 0.0

    def __enter__(self) -> Screen:
        if not self._quiet and self._stream.isatty():
            self._bars = _bars(self._stream)
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._finish_bar()
            self._bars.stop()
            self._bars = None

    def __call__(self, message: dict[str, Any]) -> None:
        if self._quiet:
            return
        if self._bars is not None:
            self._draw(message)
        else:
            self._print(message)

    def _draw(self, message: dict[str, Any]) -> None:
        if "stage" in message:
            self._finish_bar()
            self._task = self._bars.add_task(message["stage"], total=None)
        elif "line" in message:
            self._bars.console.print(message["line"], markup=False, highlight=False)
        elif self._task is not None:
            self._bars.update(self._task, completed=message["done"], total=message["total"])

    def _finish_bar(self) -> None:
        if self._task is not None:
            task = self._bars.tasks[-1]
            total = task.total or 1
            self._bars.update(self._task, completed=total, total=total)
            self._task = None

    def _print(self, message: dict[str, Any]) -> None:
        if "stage" in message:
            self._stage, self._shown = message["stage"], time.monotonic()
            print(self._stage, file=self._stream, flush=True)
        elif "line" in message:
            print(message["line"], file=self._stream, flush=True)
        elif time.monotonic() - self._shown >= PLAIN_INTERVAL_SECONDS:
            self._shown = time.monotonic()
            print(f"{self._stage} {message['done']}/{message['total']}", file=self._stream, flush=True)


def _bars(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<10}"), BarColumn(bar_width=32), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(file=stream), transient=False)

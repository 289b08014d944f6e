"""What can go wrong, as values: which rank failed, how, and the exit code a shell sees.

    exit code   0 ok · 1 failed (also a verification above its tolerance) · 2 bad configuration or input · 124 time-out
                · 128 + signal when stopped by one (130 for Ctrl-C)

When one rank fails the others usually fail after it ("connection closed by peer", SIGTERM from the launcher). They are
*victims*: `first_failure` looks past them for the rank that went wrong by itself.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_TIMED_OUT = 124
EXIT_SIGNAL = 128

_VICTIM_WORDS = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "connection refused",
    "connection closed",
    "connection reset",
    "connectfullmesh",
    "socket closed",
    "remote process exited",
    "ncclremoteerror",
    "timed out waiting",
    "application timeout caused pair closure",
    "failed to recv",
    "wait timeout",
    "a peer failed",
)
_STOPPED_BY_THE_LAUNCHER = ("SIGTERM", "SIGINT", "SIGHUP")


class ConfigError(ValueError):
    """The user asked for something that cannot be done; the message is one line: given, allowed, mend. Exit code 2."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How one rank ended without a result. JSON safe: `Failure(**dataclasses.asdict(failure)) == failure`."""

    rank: int
    """Global rank, or -1 when no single rank is to blame (a time-out, a cluster without room)."""
    world: int
    """Number of ranks of the run."""
    kind: str
    """exception, signal, exit or timeout."""
    name: str
    """Exception class, signal name, or what ended."""
    message: str = ""
    """One line."""
    traceback: str = ""
    """The Python traceback where there is one."""
    host: str = ""
    """Where the rank ran."""
    time: float = 0.0
    """Seconds since the epoch at which the rank itself noticed; 0 when unknown."""
    bad_input: bool = False
    """The user's input was at fault (a truncated video), not the run: exit code 2."""

    @property
    def exit_code(self) -> int:
        """What the command ends with when this failure ended the run."""
        if self.kind == "timeout":
            return EXIT_TIMED_OUT
        return EXIT_BAD_INPUT if self.bad_input else EXIT_FAILED

    @property
    def line(self) -> str:
        """One line for a person: `rank 2 of 4: ValueError: ...`."""
        what = f"{self.name}: {self.message}" if self.message else self.name
        return what if self.rank < 0 else f"rank {self.rank} of {self.world}: {what}"


class RunFailed(RuntimeError):
    """A run ended without a result. `.failure` says which rank and why, `.logs` where to read more."""

    def __init__(self, failure: Failure, logs: Path | None = None):
        super().__init__(failure.line)
        self.failure = failure
        self.logs = logs


class Interrupted(BaseException):
    """A signal (Ctrl-C, SIGTERM) asked the command to stop. Not an Exception, so that nothing swallows it."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__(signal.Signals(number).name)
        self.exit_code = EXIT_SIGNAL + int(number)


def one_line(error: BaseException | str, limit: int = 400) -> str:
    """The text of an error on one line, blanks joined; cut at `limit` characters with an ellipsis."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def severity(failure: Failure) -> int:
    """How likely a failure is the cause, 0 first: bad input or own exception, crash, plain exit, victim, told to stop."""
    if failure.kind == "exception":
        words = f"{failure.name}: {failure.message}".lower()
        return 3 if any(word in words for word in _VICTIM_WORDS) else 0
    if failure.kind == "signal":
        return 4 if failure.name in _STOPPED_BY_THE_LAUNCHER else 1
    return 2


def is_victim(failure: Failure) -> bool:
    """True when the rank failed because another one went away."""
    return severity(failure) >= 3


def first_failure(failures: Iterable[Failure]) -> Failure | None:
    """The failure to name: least victim-like first, then earliest, then lowest rank.

    >>> own = Failure(rank=2, world=3, kind="exception", name="ValueError", message="bad frame", time=2.0)
    >>> hurt = Failure(rank=0, world=3, kind="exception", name="RuntimeError", message="Connection closed by peer", time=1.0)
    >>> first_failure([hurt, own]).rank
    2
    """
    ordered = sorted(failures, key=lambda f: (severity(f), f.time or float("inf"), f.rank))
    return ordered[0] if ordered else None

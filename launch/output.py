"""The folder of a run: built beside its final place under another name, renamed when it is whole.

--out results      .results.partial-x1y2/ ──all went well──► results/
                                          ──a rank failed──► results.failed/    (logs, failures; results/ untouched)
                                          ──interrupted────► nothing
                                          ──killed─────────► stays; the next run with the same --out clears it

A folder under construction is locked by the process it belongs to. The system lets go of the lock when that process is gone,
however it ended, which is how left-over folders are told from those of a run that is still busy.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from launch.errors import ConfigError, Interrupted, one_line

MARK = "run.json"
"""Present in every folder of ours and in nobody else's: only such a folder is ever replaced or re-rendered."""
MADE_BY = "tokenring run"


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def is_ours(folder: Path) -> bool:
    """Whether a folder holds a run of ours."""
    try:
        return json.loads((folder / MARK).read_text(encoding="utf-8")).get("made_by") == MADE_BY
    except (OSError, ValueError, AttributeError):
        return False


def check_target(out: str, overwrite: bool) -> Path:
    """The absolute final place. Raises ConfigError where it may not be written."""
    target = Path(out).resolve()
    if target.exists() and not target.is_dir():
        raise ConfigError(f"--out {out}: it is a file; give the name of a folder")
    if target == Path.cwd() or target in Path.cwd().parents:
        raise ConfigError(f"--out {out}: the current folder cannot be replaced; name a folder inside it")
    if target.is_dir() and any(target.iterdir()):
        if not is_ours(target):
            raise ConfigError(f"--out {out}: it holds files that no run of ours wrote; name another folder")
        if not overwrite:
            raise ConfigError(f"--out {out}: it holds an earlier run; add --overwrite or name another folder")
    return target


class Scratch:
    """A new folder `<prefix>XXXX` that this process holds; those whose holder is gone are removed on the way.

    Args:
        prefix: how its name, and the name of every folder like it, begins.
        parent: where to make it; the system's place for temporary files when left out.
    """

    def __init__(self, prefix: str, parent: Path | None = None):
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        _sweep(parent, prefix)
        self.path, self._hold = _claim(prefix, parent)

    def release(self) -> None:
        """Let go of the folder, wherever it is by now, and leave it."""
        if self._hold is not None:
            os.close(self._hold)
            self._hold = None

    def remove(self) -> None:
        """The folder goes."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _claim(prefix: str, parent: Path) -> tuple[Path, int | None]:
    """A new folder and the descriptor that locks it; None on a file system without locks, where nothing is swept either."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            hold = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # swept by another process before it was locked
        try:
            fcntl.flock(hold, fcntl.LOCK_EX)
        except OSError:
            os.close(hold)
            return path, None
        if path.exists():
            return path, hold
        os.close(hold)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove our folders of that prefix which no process holds."""
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    _remove_if_left(Path(entry.path))


def _remove_if_left(path: Path) -> None:
    hold = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(hold).st_uid == os.geteuid():
            fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(hold)


class RunFolder:
    """Where a run works; `publish()` puts it in its place. Use as a context manager.

    Without `out` the folder is a temporary one: removed after success, kept after a failure because its logs are named in
    the message.
    """

    def __init__(self, out: str | None = None, overwrite: bool = False):
        self.target = check_target(out, overwrite) if out is not None else None
        self._published = False

    def __enter__(self) -> RunFolder:
        if self.target is None:
            self._scratch = Scratch("tokenring-run-")
            self.path = self._scratch.path
            return self
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._scratch = Scratch(f".{self.target.name}.partial-", self.target.parent)
            self.path = self._scratch.path
            self.path.chmod(0o755)
        except OSError as error:
            raise ConfigError(f"--out {self.target}: cannot be made ({one_line(error)}); name another folder") from None
        return self

    def publish(self) -> None:
        """The run is whole: make it appear at its place, in exchange for an earlier run there."""
        self._published = True
        if self.target is None:
            return
        _exchange(self.path, self.target)
        self.path = self.target

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        keep = error is not None and not isinstance(error, (Interrupted, KeyboardInterrupt, ConfigError))
        if keep and not self._published:
            self._keep_logs(error)
        elif not self._published or self.target is None:
            shutil.rmtree(self.path, ignore_errors=True)
        self._scratch.release()

    def _keep_logs(self, error: BaseException) -> None:
        """Give the folder a name that is never swept."""
        if self.target is None:
            failed = Path(tempfile.mkdtemp(prefix="tokenring-failed-"))
        else:
            failed = self.target.with_name(self.target.name + ".failed")
            if failed.exists() and not is_ours(failed):
                failed = Path(tempfile.mkdtemp(prefix=f"{failed.name}-", dir=failed.parent))
        _exchange(self.path, failed)
        self.path = failed
        if hasattr(error, "logs"):
            error.logs = self.path / "logs"


def _exchange(source: Path, target: Path) -> None:
    """Rename `source` to `target`; what stood there goes away only once the new one is in place."""
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent)) / target.name
        os.replace(target, old)
    try:
        os.replace(source, target)
    except OSError:
        if old is not None:
            os.replace(old, target)
        raise
    if old is not None:
        shutil.rmtree(old.parent, ignore_errors=True)

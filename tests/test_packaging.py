"""What a user installs: the wheel holds exactly the five packages, typed, with one console command."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"tokenring", "moe", "sparse_attn", "token_reduction", "launch"}


def test_the_wheel_contains_exactly_the_five_packages(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tracked = [
        p for name in (*PACKAGES, "setup.py", "pyproject.toml", "README.md", "LICENSE") for p in files(ROOT / name)
    ]
    for path in tracked:
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    wheel = next(tmp_path.glob("tokenring_parallel-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == PACKAGES
    held = {n for n in names if n.endswith(".py")}
    assert held == {str(p.relative_to(ROOT)) for p in tracked if p.suffix == ".py" and p.parent != ROOT}
    assert {f"{package}/py.typed" for package in PACKAGES} | {"moe/hardware/h100.json"} <= set(names)
    entry = next(n for n in names if n.endswith("entry_points.txt"))
    assert "tokenring = launch.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()


def files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [p for p in sorted(path.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]


def test_the_pinned_torch_comes_first() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert pins[0] == "torch==2.13.0"
    assert all("==" in pin for pin in pins)

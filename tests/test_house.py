"""The rules of the house: who may import whom, what an import costs, how long a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tokenring", "moe", "sparse_attn", "token_reduction", "launch")
ALLOWED = {
    "tokenring": set(),
    "moe": {"tokenring.topology", "tokenring.transport"},
    "sparse_attn": {"tokenring"},
    "token_reduction": {"tokenring.topology", "tokenring.transport"},
    "launch": set(PACKAGES),
}
OPTIONAL = (
    "transformers",
    "megatron",
    "ray",
    "mpi4py",
    "av",
    "triton",
    "flash_attn",
    "onnx",
    "matplotlib",
    "typer",
    "rich",
    "yaml",
    "PIL",
)
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_package_imports_only_what_the_house_allows(path: Path) -> None:
    home = path.relative_to(ROOT).parts[0]
    if "integrations" in path.parts:
        return
    for module in imports(path):
        package = module.split(".")[0]
        if package in PACKAGES and package != home:
            assert any(module == name or module.startswith(name + ".") for name in ALLOWED[home]), (
                f"{path} imports {module}"
            )


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_under_300_lines_and_schedules_under_200(path: Path) -> None:
    limit = 200 if path.parent.name == "schedules" else 300
    assert len(path.read_text().splitlines()) < limit


def test_the_executor_names_no_schedule() -> None:
    from tokenring.schedules import FORWARD

    text = (ROOT / "tokenring" / "executor.py").read_text().replace("from tokenring.", "")
    assert not [name for name in FORWARD if name in text]


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_pulls_in_nothing_optional(package: str) -> None:
    code = f"import sys, {package}; print([m for m in {OPTIONAL!r} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"

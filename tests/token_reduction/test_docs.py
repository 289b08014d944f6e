"""The examples in the docstrings and in the guide run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import token_reduction

MODULES = ["token_reduction", *(m.name for m in pkgutil.walk_packages(token_reduction.__path__, "token_reduction."))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_guide_runs_and_prints_what_it_says(capsys):
    guide = (Path(__file__).parents[2] / "docs" / "token_reduction.md").read_text()
    for block in (blocks := re.findall(r"```python\n(.*?)```", guide, re.S)):
        exec(block, {})
        said = re.findall(r"print\(.*#\s*(.+)$", block, re.M)
        assert said and capsys.readouterr().out.splitlines() == said
    assert len(blocks) == 2


def test_importing_needs_torch_and_nothing_heavy():
    code = "import sys, token_reduction; print([m for m in ('transformers', 'av', 'ray', 'PIL', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import token_reduction

MODULES = ["token_reduction", *(m.name for m in pkgutil.walk_packages(token_reduction.__path__, "token_reduction."))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_importing_needs_torch_and_nothing_heavy():
    code = "import sys, token_reduction; print([m for m in ('transformers', 'av', 'ray', 'PIL', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

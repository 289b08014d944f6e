"""Fixtures of the launcher's tests."""

import tempfile

import pytest

from tests.launch.command import ROOT
from tests.launch.fake_engine import InProcess


@pytest.fixture
def engine(monkeypatch, tmp_path_factory):
    """Replaces every engine by one without processes; `engine(failure)` makes it fail so."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("kept-logs")))

    def use(failure=None):
        monkeypatch.setattr("launch.engines.build", lambda name: InProcess(failure))

    use()
    return use


@pytest.fixture
def importable_by_ranks(monkeypatch):
    """Processes that a test starts find the stand-ins."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

"""Fixtures of the launcher's tests."""

import tempfile
from pathlib import Path

import pytest
import torch

from tests.launch import tiny_models
from tests.launch.command import ROOT
from tests.launch.drift import make_clip
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


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drifting picture of 21 frames."""
    return make_clip(tmp_path_factory.mktemp("clip") / "drift.mp4", 21)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model of each family of video language models."""
    torch.manual_seed(3)
    return {family: str(maker(tmp_path_factory.mktemp(family))) for family, maker in tiny_models.MAKERS.items()}

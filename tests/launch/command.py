"""The command with stand-ins for the pipeline, for tests."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main

ROOT = Path(__file__).parents[2]
ENTRIES = "tests.launch.fake_entries"


def command(entry, *arguments):
    """Words of a process of its own."""
    return [sys.executable, "-X", "faulthandler", "-m", ENTRIES, entry, *arguments]


def ended(process, seconds=30):
    """Exit code of a command that is about to end; what its threads do if it does not."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        pytest.fail(f"still there after {seconds} s:\n{process.communicate(timeout=seconds)[1]}")


def run(*arguments):
    """Exit code of `tokenring run` in this process."""
    return main(["run", *arguments], entry=f"{ENTRIES}:adds")


def complaint(capfd):
    """The one line on standard error; standard output is empty."""
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def temporary_files_in(folder):
    """An environment whose temporary files go to a new folder of that name."""
    folder.mkdir()
    return {**os.environ, "TMPDIR": str(folder)}

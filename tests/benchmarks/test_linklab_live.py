"""The link lab on this machine: built, measured, taken down. Skipped where namespaces cannot be made (no root, no tools)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.linklab import jobs, sparse
from benchmarks.linklab.cells import Cell
from benchmarks.linklab.crew import CrewError, hire
from benchmarks.linklab.lab import LabError, build, sweep
from benchmarks.linklab.probing import probe
from benchmarks.linklab.raw import link_rates
from benchmarks.linklab.wiring import wire

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from benchmarks.linklab.lab import build
from benchmarks.linklab.wiring import wire
with build(wire("ring", 3, 10)):
    print("up", flush=True)
    time.sleep(60)
"""


def namespaces(pid: int) -> list[str]:
    shown = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in shown.splitlines() if line.startswith(f"linklab-{pid}-")]


@pytest.fixture(scope="module", autouse=True)
def lab_can_be_built() -> None:
    try:
        with build(wire("mesh", 2, 10)):
            pass
    except LabError as error:
        pytest.skip(f"no link lab here: {error}")


def test_nothing_is_left_after_the_block_nor_after_an_error_in_it() -> None:
    with build(wire("nodes:2x2", 4, 10)):
        assert len(namespaces(os.getpid())) == 7
    assert not namespaces(os.getpid())
    with pytest.raises(ZeroDivisionError), build(wire("bus", 2, 10)):
        raise ZeroDivisionError
    assert not namespaces(os.getpid())


def hold() -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


def test_an_interrupt_takes_the_lab_down() -> None:
    process = hold()
    assert len(namespaces(process.pid)) == 3
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert not namespaces(process.pid)


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_has_is_not() -> None:
    living, killed = hold(), hold()
    killed.kill()
    killed.communicate()
    assert len(namespaces(killed.pid)) == 3
    sweep()
    assert (len(namespaces(killed.pid)), len(namespaces(living.pid))) == (0, 3)
    living.send_signal(signal.SIGINT)
    living.communicate()


def test_the_kernel_counts_on_every_link_what_the_plan_says() -> None:
    cell = Cell(topology="ring", world=3, mbit=200, kv_heads=96)
    with build(cell.wiring) as lab, hire(lab) as crew:
        for name in ("tokenring", "biring"):
            plan = cell.plan(name)
            crew.run(jobs.forward, [plan], 0)
            before = lab.carried()
            crew.run(jobs.forward, [plan], 3)
            after = lab.carried()
            for link in cell.wiring.shaped:
                planned = 4 * sum(
                    plan.bytes_sent(*pair) for pair in cell.wiring.ways if link in cell.wiring.crosses(*pair)
                )
                # Headers add 1% of frames of 9,000 bytes, acknowledgements of what comes the other way as much again.
                assert planned < after[link] - before[link] < planned * 1.04 + 200_000


def test_rates_are_those_asked_for_also_after_retuning_and_a_failing_task_names_its_rank() -> None:
    with build(wire("mesh", 2, 40)) as lab, hire(lab) as crew:
        for mbit in (20, 80):
            lab.retune(wire("mesh", 2, mbit))
            assert link_rates(crew) == pytest.approx(dict.fromkeys(lab.wiring.shaped, mbit * 125_000), rel=0.1)
        with pytest.raises(ValueError, match="cannot be retuned"):
            lab.retune(wire("switch", 2, 40))
        with pytest.raises(CrewError, match="rank 0: Traceback"):
            crew.run(jobs.forward, [], 1)


def test_the_probe_finds_a_switch_from_inside_and_chooses_by_it_as_by_the_true_one() -> None:
    found = probe(wire("switch", 3, 40), 1.0)
    assert found.found == "switch" and found.rate_error < 0.5
    assert found.choices == 16 and found.same >= 8 and found.worst < 1.2


def test_sparse_prefill_sends_what_its_plans_say_and_is_set_beside_every_dense_schedule() -> None:
    asked = sparse.Prefill(length=1024, heads=(2, 1), dim=16, world=2)
    (result,) = sparse.measure(asked, [("mesh", 80.0)], ["pooled"], repeat=1)
    assert {row.name for row in result.dense} == {*(set(sparse.SCHEDULES) - {"mesh:2x2"}), result.auto}
    (row,) = result.sparse
    assert 0 < row.transfer_bound < row.measured and row.bytes_sent < result.best_dense.bytes_sent
    assert result.to_dict()["faster than best dense"] == [result.best_dense.measured / row.measured]

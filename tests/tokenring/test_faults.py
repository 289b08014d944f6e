"""Something goes wrong at every moment of small plans: every rank ends soon, says why, and a new group works."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import tokenring as tr
from tests.pool import Pool
from tests.tokenring.faulty import BOUND_SECONDS, CASES, EXIT_CODE, Case, Fault, Outcome, attempt
from tokenring.transport.distributed import DistributedTransport
from tokenring.transport.inprocess import LocalWorld

PATIENT_SECONDS = 60.0
TOLD = "rank {} of {}: Injected: broken on purpose"


def in_threads(case: Case, fault: Fault | None, timeout_seconds: float = PATIENT_SECONDS) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}

    def work(group: Any) -> None:
        outcomes[group.rank()] = attempt(tr.connect(group, timeout_seconds=timeout_seconds), case, fault)

    threads = [threading.Thread(target=work, args=(group,)) for group in LocalWorld(case.world).groups()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[rank] for rank in range(case.world)]


def in_processes(group: Any, jobs: list[tuple[Case, Fault | None]], timeout_seconds: float) -> list[tuple]:
    """Each job on lanes of its own; the last field counts what this process then still holds: threads and open files."""
    seen = []
    for case, fault in jobs:
        transport = DistributedTransport(group, PATIENT_SECONDS)
        transport.timeout_seconds = timeout_seconds
        outcome = attempt(transport, case, fault)
        del transport
        gc.collect()
        seen.append((outcome, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))))
    return seen


def check_raised(case: Case, fault: Fault, outcomes: list[Outcome]) -> None:
    """The faulty rank raised its own error; the others that one's, unless they had what they needed; nobody can go on."""
    what = f"{case}, {fault}: {case.moments(fault.rank)[fault.moment]}\n" + "\n".join(map(str, outcomes))
    told, stopped = TOLD.format(fault.rank, case.world), 0
    for rank, outcome in enumerate(outcomes):
        assert outcome.seconds < BOUND_SECONDS, what
        if rank == fault.rank:
            assert outcome.kind == "Injected", what
            assert "cannot be used again (Injected: broken on purpose); make a new group" in outcome.later, what
        elif outcome.kind:
            check_named(rank, case, outcome.error, outcome.kind)
            assert told in outcome.error, what
            assert "cannot be used again (rank" in outcome.later and told in outcome.later, what
            stopped += 1
        else:
            assert outcome.right, what
            assert outcome.later.startswith(f"TransportError: rank {rank} of {case.world}, header of call"), what
            assert told in outcome.later, what
    assert stopped or not case.sends_after(fault.rank, fault.moment), what


def check_named(rank: int, case: Case, error: str, kind: str) -> None:
    assert kind == "TransportError", error
    assert error.startswith(f"rank {rank} of {case.world}, "), error
    assert "step " in error or "header of call" in error, error


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_error_at_any_moment_of_any_rank_ends_every_rank_at_once(case: Case) -> None:
    for rank in range(case.world):
        for moment in range(len(case.moments(rank))):
            fault = Fault(rank, moment, "raise")
            check_raised(case, fault, in_threads(case, fault))


def delays(world: int, seconds: float) -> list[tuple[Case, Fault]]:
    """Of one rank, at every moment of the world's first plan and at three of each of the others."""
    jobs = []
    for turn, case in enumerate(case for case in CASES if case.world == world):
        rank = turn % world
        moments = range(len(case.moments(rank)))
        picked = moments if turn == 0 else (moments[1], moments[len(moments) // 2], moments[-3])
        jobs += [(case, Fault(rank, moment, "delay", seconds)) for moment in picked]
    return jobs


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_short_delay_changes_nothing(world: int) -> None:
    jobs = delays(world, 0.05)
    with ThreadPoolExecutor(16) as threads:
        for (case, fault), outcomes in zip(jobs, threads.map(lambda job: in_threads(*job), jobs), strict=True):
            assert all(o.right and not o.later for o in outcomes), (case, fault, outcomes)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_delay_past_the_time_out_ends_every_rank_that_waits(world: int) -> None:
    jobs = delays(world, 6.0)
    with ThreadPoolExecutor(len(jobs)) as threads:
        results = list(threads.map(lambda job: in_threads(*job, timeout_seconds=2.0), jobs))
    for (case, fault), outcomes in zip(jobs, results, strict=True):
        check_timed_out(case, fault, outcomes, 2.0)


def check_timed_out(case: Case, fault: Fault, outcomes: list[Outcome], timeout_seconds: float) -> None:
    what = f"{case}, {fault}: {case.moments(fault.rank)[fault.moment]}\n" + "\n".join(map(str, outcomes))
    for rank, outcome in enumerate(outcomes):
        assert outcome.seconds < BOUND_SECONDS, what
        if outcome.kind:
            check_named(rank, case, outcome.error, outcome.kind)
            assert f"timed out after {timeout_seconds:g} s" in outcome.error, what
            assert "from rank" in outcome.error or "to rank" in outcome.error, what
        else:
            assert outcome.right, what
    if case.sends_after(fault.rank, fault.moment):
        assert any(o.kind for o in outcomes) and all(o.later for o in outcomes), what


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[6], *CASES[10:12], CASES[14]], ids=str)
@pytest.mark.parametrize("act", ["more", "fewer"])
def test_a_message_of_another_size_is_named(case: Case, act: str) -> None:
    for moment, name in enumerate(case.moments(1)):
        _, _, place = name.partition(" ")
        step, _, lane = place.partition("/")
        if not name.startswith("push") or not case.plan.steps(1)[int(step)].sends[int(lane)]:
            continue
        peer = case.plan.steps(1)[int(step)].sends[int(lane)][0].destination
        outcomes = in_threads(case, Fault(1, moment, act))
        named = f"rank {peer} of {case.world}, step {step}: rank 1 sent ("
        assert outcomes[peer].error.startswith(named) and "expected (" in outcomes[peer].error, (name, outcomes)
        for rank, outcome in enumerate(outcomes):
            assert outcome.seconds < BOUND_SECONDS
            assert named in (outcome.error or outcome.later), (rank, name, outcomes)


def some_faults(rank: int) -> list[tuple[Case, Fault]]:
    """Every third moment of one backward plan, and one of each of the other plans for three ranks."""
    jobs = []
    for case in CASES:
        if case.world == 3:
            moments = range(len(case.moments(rank)))
            whole = case.backward and case.schedule == "tokenring"
            picked = moments[::3] if whole else moments[len(moments) // 2 :][:1]
            jobs += [(case, Fault(rank, moment, "raise")) for moment in picked]
    return jobs


def test_an_error_ends_every_process_at_once_and_new_lanes_work(pool: Pool) -> None:
    well = (Case(3, "ring"), None)
    jobs = [well, *some_faults(1), well]
    results = pool.run(3, in_processes, jobs, PATIENT_SECONDS)
    for number, (case, fault) in enumerate(jobs):
        outcomes = [results[rank][number][0] for rank in range(3)]
        if fault is None:
            assert all(o.right and not o.later for o in outcomes), outcomes
        else:
            check_raised(case, fault, outcomes)
    for rank in range(3):
        (_, threads, files), (_, threads_now, files_now) = results[rank][0], results[rank][-1]
        assert threads_now <= threads + 1 and files_now <= files, f"rank {rank}: {results[rank]}"


LATE = Case(3, "tokenring"), Fault(1, 4, "raise")


def broken_while_another_is_late(group: Any) -> Outcome:
    """Rank 1 fails as it computes; its payload still waits for the header of rank 2, which comes a second later."""
    transport = DistributedTransport(group, PATIENT_SECONDS)
    if transport.rank == 2:
        time.sleep(1.0)
    return attempt(transport, *LATE)


def test_an_error_is_told_while_headers_are_under_way(pool: Pool) -> None:
    assert LATE[0].moments(1)[4].startswith("compute")
    outcomes = pool.run(3, broken_while_another_is_late)
    check_raised(*LATE, outcomes)
    assert all(outcome.kind for outcome in outcomes)
    assert outcomes[1].seconds < 0.9, "it waited for the late rank"


def test_a_delay_past_the_time_out_ends_every_process_that_waits(pool: Pool) -> None:
    case = Case(3, "tokenring", backward=True)
    jobs = [(case, Fault(1, moment, "delay", 2.0)) for moment in (0, 4, 10)]
    results = pool.run(3, in_processes, jobs, 0.7)
    for number, (_, fault) in enumerate(jobs):
        check_timed_out(case, fault, [results[rank][number][0] for rank in range(3)], 0.7)
    assert all(rank[0][0].right for rank in pool.run(3, in_processes, [(case, None)], PATIENT_SECONDS))


def first_error(outcome: Outcome) -> str:
    """Of a rank that may have had all it needed."""
    return outcome.error or outcome.later.removeprefix("TransportError: ")


@pytest.fixture(scope="module")
def few() -> Iterator[Pool]:
    """Three workers that may be killed."""
    workers = Pool(3)
    yield workers
    workers.stop()


@pytest.mark.parametrize(
    ("case", "moment"),
    [(Case(3, "tokenring"), m) for m in (0, 4, 18)] + [(Case(3, "ring", backward=True), 2)],
    ids=str,
)
def test_a_killed_process_is_named_by_all_that_are_left(few: Pool, case: Case, moment: int) -> None:
    start = time.monotonic()
    results = few.run(3, in_processes, [(case, Fault(1, moment, "end"))], PATIENT_SECONDS, ends=(1,))
    assert results[1] == EXIT_CODE and time.monotonic() - start < BOUND_SECONDS + 10
    for rank in (0, 2):
        ((outcome, _, _),) = results[rank]
        assert outcome.kind == "TransportError" or outcome.right
        check_named(rank, case, said := first_error(outcome), "TransportError")
        assert "rank 1 failed: it closed its connection without a word, so it ended or was killed" in said
        assert not outcome.kind or "cannot be used again" in outcome.later


def test_more_bytes_than_a_receive_holds_end_its_process_and_are_known_to_all(few: Pool) -> None:
    """What gloo does with them; so sizes are agreed on before."""
    case = Case(3, "ring")
    moment = case.moments(1).index("push 0/0")
    peer = case.plan.steps(1)[0].sends[0][0].destination
    results = few.run(3, in_processes, [(case, Fault(1, moment, "more"))], PATIENT_SECONDS, ends=(peer,))
    assert results[peer] == -6
    for rank in {0, 1, 2} - {peer}:
        ((outcome, _, _),) = results[rank]
        check_named(rank, case, said := first_error(outcome), "TransportError")
        assert f"rank {peer} failed: it closed its connection" in said

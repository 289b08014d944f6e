"""The crew: one process in each rank's namespace, joined by gloo over the lab's links, that does one task after another.

A task is `function(rank, world, *args)` with a function of a module; it runs on all ranks at once. A rank that fails, or is
silent past the limit, ends the crew: a broken group must not leak into the next cell.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.linklab.lab import Lab

STORE_PORT = 29_400
START_SECONDS = 120.0
TASK_SECONDS = 300.0
PRIORITY = 1
"""Real-time priority of the processes (SCHED_FIFO): they mostly wait, and what else runs here must not delay their packets."""


class CrewError(RuntimeError):
    """A rank failed; the message holds its traceback."""


class Crew:
    """Processes that outlive tasks. Make it with `hire`."""

    def __init__(self, lab: Lab, processes: list[subprocess.Popen[bytes]], pipes: list[Connection]) -> None:
        self.lab, self._processes, self._pipes = lab, processes, pipes

    def run(self, function: Callable[..., Any], *args: Any, limit_seconds: float = TASK_SECONDS) -> list[Any]:
        """`function(rank, world, *args)` on every rank; the results in rank order."""
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._answers(time.monotonic() + limit_seconds)

    def _answers(self, deadline: float) -> list[Any]:
        answers: list[tuple[bool, Any]] = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                answers.append((False, "no answer in time"))
                continue
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append((False, f"ended with exit code {self._processes[rank].wait()}"))
        failures = [f"rank {rank}: {text}" for rank, (good, text) in enumerate(answers) if not good]
        if failures:
            raise CrewError("\n".join(failures))
        return [value for _, value in answers]

    def dismiss(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for pipe in self._pipes:
            pipe.close()


@contextmanager
def hire(lab: Lab) -> Iterator[Crew]:
    """A crew in a lab's namespaces, dismissed at the end."""
    crew = Crew(lab, [], [])
    try:
        for rank in range(lab.wiring.world):
            mine, theirs = socket.socketpair()
            with mine, theirs:
                crew._pipes.append(Connection(os.dup(mine.fileno())))
                crew._processes.append(_start(lab, rank, theirs.fileno()))
        crew._answers(time.monotonic() + START_SECONDS)
        yield crew
    finally:
        crew.dismiss()


def _start(lab: Lab, rank: int, pipe: int) -> subprocess.Popen[bytes]:
    words = (rank, lab.wiring.world, pipe, lab.address(0))
    command = lab.command(rank, sys.executable, "-m", __name__, *map(str, words))
    settings = {"GLOO_SOCKET_IFNAME": lab.device(rank), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen(command, pass_fds=(pipe,), env=os.environ | settings, start_new_session=True)


def _work(rank: int, world: int, pipe: Connection, store_address: str) -> None:
    import torch
    import torch.distributed as dist

    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))  # before there are threads: they take it over
    except PermissionError:
        pipe.send((False, "real-time priority was refused; run where root may set it (CAP_SYS_NICE)"))
        return
    torch.set_num_threads(1)
    limit = timedelta(seconds=TASK_SECONDS)
    store = dist.TCPStore(store_address, STORE_PORT, world, is_master=rank == 0, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    dist.barrier()
    pipe.send((True, None))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, world, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


if __name__ == "__main__":
    _work(int(sys.argv[1]), int(sys.argv[2]), Connection(int(sys.argv[3])), sys.argv[4])

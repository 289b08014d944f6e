"""One persistent pool of worker processes for every multi-rank test.

Eight processes join one gloo group when the first test asks; a test runs `function(group, *args)` on the first `world` of
them, on a subgroup that is made once. They are forked from one server that has imported torch, so that a pool starts in a
fraction of a second; a task costs milliseconds. Groups that a task makes are gone before the next one starts: a gloo loop
wakes a hundred times a second for as long as its group lives. After a failure the pool is thrown away, because a broken group
must not leak into the next test; so it is after a task that was meant to end a worker.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import shutil
import tempfile
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

MAX_WORLD = 8
TASK_SECONDS = 300


def keeps_groups(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a task whose groups later tasks use."""
    function.keeps_groups = True
    return function


class WorkerError(AssertionError):
    """A task failed on a worker; the message holds each failing rank's traceback."""


class Pool:
    """Workers that outlive tests."""

    def __init__(self, workers: int = MAX_WORLD) -> None:
        self.workers = workers
        self._pipes: list[Any] = []
        self._workers: list[Any] = []

    def run(self, world: int, function: Callable[..., Any], *args: Any, ends: Collection[int] = ()) -> list[Any]:
        """`function(group, *args)` on ranks 0 to world-1; results in rank order. `function` lives in a module.

        ends: ranks whose process is to end in the task; their result is its exit code.
        """
        if not self._workers:
            self._start()
        for pipe in self._pipes[:world]:
            pipe.send((world, function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes[:world]):
            if not pipe.poll(TASK_SECONDS):
                answers.append((False, f"no answer within {TASK_SECONDS} s"))
                continue
            try:
                answers.append(pipe.recv())
            except EOFError:
                self._workers[rank].join()
                code = self._workers[rank].exitcode
                answers.append((True, code) if rank in ends else (False, f"worker {rank} ended with exit code {code}"))
        failures = [f"rank {rank} of {world}:\n{text}" for rank, (good, text) in enumerate(answers) if not good]
        if failures or ends:
            self.stop()
        if failures:
            raise WorkerError("\n".join(failures))
        return [value for _, value in answers]

    def stop(self) -> None:
        """End the workers; the next run starts new ones."""
        for worker in self._workers:
            worker.kill()
            worker.join()
        if self._workers:
            shutil.rmtree(self._store.parent, ignore_errors=True)
        self._pipes, self._workers = [], []

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "tests.oracle", "tokenring"])
        self._store = Path(tempfile.mkdtemp(prefix="pool-")) / "store"
        for rank in range(self.workers):
            mine, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(rank, self.workers, self._store, theirs), daemon=True)
            worker.start()
            theirs.close()
            self._pipes.append(mine)
            self._workers.append(worker)


def _work(rank: int, workers: int, store: Path, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = timedelta(seconds=TASK_SECONDS)
    files = dist.FileStore(str(store), workers)
    dist.init_process_group("gloo", store=files, rank=rank, world_size=workers, timeout=limit)
    groups = {world: dist.new_group(list(range(world)), timeout=limit) for world in range(1, workers + 1)}
    kept = set(dist.distributed_c10d._world.pg_map)
    while True:
        try:
            world, function, args = pipe.recv()
        except EOFError:
            return
        if over := [group for group in dist.distributed_c10d._world.pg_map if group not in kept]:
            for made in over:
                dist.destroy_process_group(made)
            del over, made
            gc.collect()
        try:
            pipe.send((True, function(groups[world], *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        if hasattr(function, "keeps_groups"):
            kept |= set(dist.distributed_c10d._world.pg_map)

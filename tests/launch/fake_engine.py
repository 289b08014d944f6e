"""An engine without processes, for tests of what happens around one."""

import os

from launch.engines.base import Outcome
from launch.records import RankRecord


class InProcess:
    """An engine without processes: the entry's record, or a failure, as if ranks had left it."""

    name = "torchrun"

    def __init__(self, failure=None):
        self.failure = failure

    def start(self, config, nproc, run_dir, entry, *, sink=None, started=0.0):
        (run_dir / "logs").mkdir()
        (run_dir / "logs" / "rank-0.log").write_text("what rank 0 printed")
        if self.failure is not None:
            return Outcome((), self.failure)
        sink({"stage": "encode"})
        print("an engine prints")
        os.write(1, b"a C library prints\n")
        verify = {"max_logit_diff": 1.0, "tolerance": 1e-4, "same_tokens": False} if config.output.verify else None
        made = tuple(
            RankRecord(rank=rank, world=nproc, frames=2, generated_ids=[7], text="a hare", verify=verify)
            for rank in range(nproc)
        )
        for record in made:
            path = run_dir / "records" / f"rank-{record.rank}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(record.to_json())
        return Outcome(made, None)

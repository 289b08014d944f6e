"""What runs on the cluster: one actor a rank, around the same worker that the other engines start as a process."""

from __future__ import annotations

import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch import worker
from launch.config import from_json
from launch.engines.base import prepare
from launch.engines.rendezvous import LOOPBACK, Place, host_store, own_address
from launch.output import Scratch


class RankActor:
    """Two of its methods may run at once, so that it can be asked for progress, or to go, while the rank works.

    Args:
        config: JSON text of the configuration.
        parent: folder to work in; None for the machine's place for temporary files.
    """

    def __init__(self, config: str, parent: str | None):
        self.scratch = Scratch("tokenring-rank-", None if parent is None else Path(parent))
        self.folder = self.scratch.path
        self.config = from_json(config)
        self.store: Any = None
        prepare(self.config, self.folder)
        worker.redirect_output(self.folder / "logs" / "rank.log")

    def node(self) -> str:
        """The Ray node this actor is on."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def host(self, world: int, local: bool) -> str:
        """Host the store of the ranks; gives its address."""
        limit = self.config.engine.exchange_timeout_seconds
        self.store = host_store(world, limit, LOOPBACK if local else own_address())
        return f"{self.store.host}:{self.store.port}"

    def run(self, entry: str, place: dict[str, Any], address: str) -> tuple[str, str]:
        """("record" or "failure", JSON text). A failure is an answer here, so that Ray does not wrap it."""
        rank = place["rank"]
        try:
            worker.run_in(self.folder, entry, Place(**place), address)
        except BaseException:
            traceback.print_exc()
            return "failure", (self.folder / "failures" / f"rank-{rank}.json").read_text(encoding="utf-8")
        return "record", (self.folder / "records" / f"rank-{rank}.json").read_text(encoding="utf-8")

    def progress(self, offset: int) -> bytes:
        """What rank 0 said since byte `offset`."""
        with suppress(FileNotFoundError), (self.folder / "progress.jsonl").open("rb") as file:
            file.seek(offset)
            return file.read()
        return b""

    def finish(self) -> bytes:
        """The log of this rank; its folder goes."""
        sys.stdout.flush()
        sys.stderr.flush()
        log = (self.folder / "logs" / "rank.log").read_bytes()
        self.scratch.remove()
        return log

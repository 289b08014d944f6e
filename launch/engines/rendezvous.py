"""Which rank am I, and how do the ranks find each other.

A launcher tells a process its rank through the environment. Read in this order, first hit wins:

    torchrun, Ray Train   RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT
    Open MPI              OMPI_COMM_WORLD_RANK, ..._SIZE, ..._LOCAL_RANK, ..._LOCAL_SIZE
    MPICH, Hydra          PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS
    MVAPICH2              MV2_COMM_WORLD_RANK, ..._SIZE, ..._LOCAL_RANK, ..._LOCAL_SIZE
    Slurm (inside srun)   SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST

The ranks then meet at a key/value store that rank 0 (or the launcher) hosts on a port the system chose; where all ranks
are on one machine, store and connections stay on the loopback interface.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from launch.errors import ConfigError

if TYPE_CHECKING:
    import torch.distributed as dist

LOOPBACK = "127.0.0.1"
_FAMILIES = (
    ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")),
    ("mpi", tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    ("mpi", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
    ("mpi", tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    ("slurm", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")),
)


@dataclass(frozen=True)
class Place:
    """Where a process stands among the ranks."""

    rank: int
    world: int
    local_rank: int
    """Rank among those on this machine."""
    local_world: int
    """Ranks on this machine."""
    source: str
    """torchrun, mpi, slurm or ray."""

    @property
    def one_machine(self) -> bool:
        """All ranks are on this machine."""
        return self.local_world == self.world


def discover(environ: Mapping[str, str] | None = None) -> Place | None:
    """This process's place as the launcher around it says, or None when no launcher is around.

    Raises:
        ConfigError: a number that is none, a rank outside the world, or two launchers that disagree (a `RANK` left over
            in the shell under mpirun); the message names both values.

    >>> discover({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"})
    Place(rank=1, world=4, local_rank=1, local_world=4, source='mpi')
    """
    environ = os.environ if environ is None else environ
    found = [
        (names, _place(source, names, environ))
        for source, names in _FAMILIES
        if names[0] in environ and names[1] in environ
    ]
    if not found:
        return None
    if len(found) > 1 and _agree(found[0][1], found[1][1]) and "MASTER_ADDR" not in environ:
        del found[0]  # a left-over RANK that happens to be right; what started this process carries the address
    names, place = found[0]
    nested = place.source == "torchrun" and "TORCHELASTIC_RUN_ID" in environ
    for other_names, other in found[1:]:
        if other.source == "mpi" and not nested and not _agree(place, other):
            raise ConfigError(
                f"two launchers disagree: {_pair(names, environ)} but {_pair(other_names, environ)}; "
                f"unset {names[0]} and {names[1]} if they are left over in the shell"
            )
    return place


def _agree(one: Place, other: Place) -> bool:
    return (one.rank, one.world) == (other.rank, other.world)


def _pair(names: tuple[str, ...], environ: Mapping[str, str]) -> str:
    return f"{names[0]}={environ[names[0]]} {names[1]}={environ[names[1]]}"


def _place(source: str, names: tuple[str, ...], environ: Mapping[str, str]) -> Place:
    rank, world = _number(names[0], environ), _number(names[1], environ)
    if not 0 <= rank < world:
        raise ConfigError(f"{_pair(names, environ)}: a rank must be from 0 to {world - 1}; unset them if left over")
    local_rank = _number(names[2], environ) if names[2] in environ else rank
    if source == "slurm":
        nodes = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1")))
        return Place(rank, world, local_rank, max(1, world // nodes), source)
    local_world = _number(names[3], environ) if names[3] in environ else world
    return Place(rank, world, local_rank, local_world, source)


def _number(name: str, environ: Mapping[str, str]) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(f"{name}={environ[name]!r} is not a whole number; unset it or start a launcher") from None


def host_store(world: int, timeout: float, address: str = LOOPBACK) -> dist.TCPStore:
    """A store on a free port of `address`, listening there and nowhere else; `.host` and `.port` tell the others."""
    import torch.distributed as dist

    listener = socket.create_server((address, 0), backlog=4096)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address,
        port,
        world,
        True,
        timedelta(seconds=timeout),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def connect_store(address: str, timeout: float) -> dist.TCPStore:
    """The store at `host:port`, hosted by somebody else."""
    import torch.distributed as dist

    host, _, port = address.rpartition(":")
    return dist.TCPStore(host, int(port), None, False, timedelta(seconds=timeout), wait_for_workers=False)


def own_address() -> str:
    """The address of this machine that other machines reach (the one its default route leaves from)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return LOOPBACK


def join(place: Place, *, device: str, timeout: float, address: str | None = None) -> dist.ProcessGroup:
    """Make the process group of all ranks; every exchange in it ends or fails within `timeout` seconds.

    Args:
        place: see `discover`.
        device: "cpu" (gloo) or "cuda" (nccl for tensors there, gloo beside it).
        timeout: seconds.
        address: `host:port` of the store, when who started the ranks gave one.
    """
    import torch.distributed as dist

    if place.one_machine:
        _stay_local()
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    limit = timedelta(seconds=timeout)
    if address is None and place.source == "torchrun":
        _require("MASTER_ADDR", "MASTER_PORT")
        dist.init_process_group(backend, init_method="env://", timeout=limit, rank=place.rank, world_size=place.world)
    else:
        store = connect_store(address, timeout) if address else _meet(place, timeout)
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=limit)
    return dist.group.WORLD


def _meet(place: Place, timeout: float) -> dist.TCPStore:
    """The store of ranks whose launcher carries no address for them."""
    if place.source == "mpi":
        return _meet_through_mpi(place, timeout)
    import torch.distributed as dist

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ConfigError(
            "Slurm gave a rank but neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST; start through srun"
        )
    host = LOOPBACK if place.one_machine else first_host(nodes)
    job = f"{os.environ.get('SLURM_JOB_ID', '')}.{os.environ.get('SLURM_STEP_ID', '')}"
    port = 20000 + zlib.crc32(job.encode()) % 20000
    return dist.TCPStore(host, port, place.world, place.rank == 0, timedelta(seconds=timeout), wait_for_workers=False)


def _meet_through_mpi(place: Place, timeout: float) -> dist.TCPStore:
    """Rank 0 hosts the store and MPI carries its address; after that MPI is only the process starter."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"started by mpirun but mpi4py does not load ({error}); install the extra `mpi`") from None
    comm = MPI.COMM_WORLD
    if (comm.Get_rank(), comm.Get_size()) != (place.rank, place.world):
        raise ConfigError(
            f"mpirun says rank {place.rank} of {place.world} but mpi4py says rank {comm.Get_rank()} of "
            f"{comm.Get_size()}: mpirun and mpi4py belong to different MPI installations; use the mpirun of this one"
        )
    store = (
        host_store(place.world, timeout, LOOPBACK if place.one_machine else own_address()) if place.rank == 0 else None
    )
    card = bytearray(256)
    if store is not None:
        text = f"{store.host}:{store.port}".encode()
        card[: len(text)] = text
    comm.Bcast([card, MPI.BYTE], root=0)
    return store or connect_store(card.rstrip(b"\0").decode(), timeout)


def first_host(nodes: str) -> str:
    """First name of a Slurm node list.

    >>> first_host("gpu[07-09,12],login1"), first_host("a1,b2")
    ('gpu07', 'a1')
    """
    match = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\])?", nodes)
    assert match is not None
    return match.group(1) + (match.group(2) or "")


def _require(*names: str) -> None:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(f"RANK is set but {' and '.join(missing)} not: unset RANK, or start through torchrun")


def _stay_local() -> None:
    """Keep gloo and NCCL on the loopback interface unless the user chose one."""
    local = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if local is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, local)

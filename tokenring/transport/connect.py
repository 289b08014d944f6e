"""The transport of a group, and what it sends while someone counts or traces."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist

from tokenring.transport.base import SingleRank, Transport
from tokenring.transport.events import Trace, Traffic, listening
from tokenring.transport.messages import DEFAULT_TIMEOUT_SECONDS

_runtimes: weakref.WeakKeyDictionary[Any, Transport] = weakref.WeakKeyDictionary()


def connect(group: Any, *, timeout_seconds: float | None = None) -> Transport:
    """The transport of a group; the first call on a group is collective (it makes and warms the lanes).

    Args:
        group: a ProcessGroup, a 1-D DeviceMesh, a LocalGroup (threads in this process), or None for one rank alone.
        timeout_seconds: longest wait for one exchange; kept for the group. 300 s where nobody says.
    """
    if group is None:
        return SingleRank()
    if isinstance(group, Transport):
        return group
    if hasattr(group, "get_group") and hasattr(group, "mesh_dim_names"):
        if group.ndim != 1:
            raise ValueError(f"group is a {group.ndim}-D DeviceMesh; give one axis of it, for instance mesh['cp']")
        group = group.get_group()
    if group not in _runtimes:
        limit = DEFAULT_TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds
        if hasattr(group, "make_transport"):
            _runtimes[group] = group.make_transport(limit)
        elif isinstance(group, dist.ProcessGroup):
            _runtimes[group] = _distributed(group, limit)
        else:
            raise ValueError(
                f"group is a {type(group).__name__}; give a ProcessGroup this rank belongs to, a 1-D DeviceMesh, a LocalGroup or None"
            )
    runtime = _runtimes[group]
    if timeout_seconds is not None:
        runtime.timeout_seconds = timeout_seconds
    return runtime


def _distributed(group: dist.ProcessGroup, timeout_seconds: float) -> Transport:
    from tokenring.transport.distributed import DistributedTransport

    return DistributedTransport(group, timeout_seconds) if group.size() > 1 else SingleRank()


def count_traffic(group: Any) -> AbstractContextManager[Traffic]:
    """Count the payload bytes that leave this rank inside the block.

    >>> with count_traffic(None) as traffic:
    ...     pass
    >>> traffic.sent
    {}
    """
    return listening(connect(group)._ledger.traffic, Traffic())


def trace(group: Any) -> AbstractContextManager[Trace]:
    """Collect what this rank does inside the block: compute, send, wait and merge events with times.

    For one rank alone, make the transport once and give it here and to `attention`: `alone = connect(None)`.
    """
    if group is None:
        raise ValueError(
            "trace got no group; for one rank alone give `alone = connect(None)` here and as group= of the calls"
        )
    return listening(connect(group)._ledger.traces, Trace())

"""The words that every part of the transport shares."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

LANES = 3
CONTROL_LANE = LANES
DEFAULT_TIMEOUT_SECONDS = 300.0
HEADER_BYTES = 504

Message = tuple[int, Tensor]
Verdict = Callable[[list[bytes]], None]
"""Sees the headers of all ranks, in rank order; raises ValueError, on every rank alike, where they do not go together."""


class TransportError(RuntimeError):
    """A transfer failed or timed out. The message names rank, step and peer; the group is poisoned afterwards."""

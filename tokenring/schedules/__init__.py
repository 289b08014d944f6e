"""Schedules: pure functions from a problem and a rank to that rank's steps. One short file each."""

from __future__ import annotations

from tokenring.plan import Builder
from tokenring.schedules.biring import biring
from tokenring.schedules.gather import gather
from tokenring.schedules.ring import ring
from tokenring.schedules.tokenring import tokenring

FORWARD: dict[str, Builder] = {"ring": ring, "biring": biring, "tokenring": tokenring, "gather": gather}

BACKWARD: dict[str, Builder] = {"ring:direct": ring, "biring": biring, "tokenring": tokenring, "gather": gather}

NAMES = ("auto", *FORWARD)
"""What `schedule=` takes."""

BACKWARD_NAMES = ("auto", *BACKWARD)
"""What `backward_schedule=` takes."""

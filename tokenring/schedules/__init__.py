"""Schedules: pure functions from a problem and a rank to that rank's steps. One short file each.

A builder ends with a step that moves nothing between ranks, and the number of steps before it depends on the world alone: so
one schedule can run inside another.
"""

from __future__ import annotations

import re
from functools import lru_cache

from tokenring.plans.plan import Builder
from tokenring.schedules.biring import biring
from tokenring.schedules.gather import gather
from tokenring.schedules.hybrid import MOVING, Hybrid
from tokenring.schedules.mesh import Mesh
from tokenring.schedules.ring import ring, ring_riding
from tokenring.schedules.tokenring import tokenring
from tokenring.schedules.usp import Usp

FORWARD: dict[str, Builder] = {"ring": ring, "biring": biring, "tokenring": tokenring, "gather": gather}

BACKWARD: dict[str, Builder] = {
    "ring": ring_riding,
    "ring:direct": ring,
    **{k: v for k, v in FORWARD.items() if k != "ring"},
}

SHAPED = ("mesh:AxB", "ulysses", "usp:UxR", "hybrid:OUTER/INNER@SIZE")
"""Schedules in both directions that need the world, or numbers that divide it."""

NAMES = ("auto", *FORWARD, *SHAPED)
"""What `schedule=` takes."""

BACKWARD_NAMES = ("auto", *BACKWARD, *SHAPED)
"""What `backward_schedule=` takes."""


@lru_cache(maxsize=1024)
def builder(name: str, world: int, backward: bool = False) -> Builder:
    """The builder of a schedule's name, or ValueError that says what is allowed."""
    flat = BACKWARD if backward else FORWARD
    if name in flat:
        return flat[name]
    if name == "ulysses":
        return Usp(world, 1)
    if found := re.fullmatch(r"(mesh|usp):(\d+)x(\d+)", name):
        a, b = int(found[2]), int(found[3])
        if a * b != world:
            raise ValueError(
                f"schedule {name!r} is for {a * b} ranks, there are {world}; the numbers must multiply to that"
            )
        return Mesh(a, b) if found[1] == "mesh" else Usp(a, b)
    if found := re.fullmatch(r"hybrid:([^/@]+)/([^@]+)@(\d+)", name):
        return _hybrid(name, *found.groups(), world, backward)
    names = BACKWARD_NAMES if backward else NAMES
    what = "backward_schedule" if backward else "schedule"
    raise ValueError(f"{what} is {name!r}; give one of {', '.join(names)}")


def _hybrid(name: str, outer: str, inner: str, size_text: str, world: int, backward: bool) -> Builder:
    size = int(size_text)
    if outer not in MOVING:
        raise ValueError(f"schedule {name!r} has {outer!r} between nodes; give one of {', '.join(MOVING)}")
    if size < 1 or world % size:
        raise ValueError(f"schedule {name!r} has nodes of {size} ranks, which do not divide {world} ranks")
    if inner == "ulysses" and outer == "ring":
        return Usp(size, world // size)
    if inner == "ulysses" or inner.startswith(("usp", "hybrid")):
        raise ValueError(
            f"schedule {name!r} has {inner!r} inside; give ring, biring, tokenring, gather or mesh:AxB "
            "(ulysses too where ring is between nodes)"
        )
    return Hybrid(outer, builder("ring:direct" if backward and inner == "ring" else inner, size, backward), size)

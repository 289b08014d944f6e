"""A mesh of two axes over all workers of the pool."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.pool import keeps_groups


@lru_cache(maxsize=1)
def two_axes() -> DeviceMesh:
    """dp 2 x cp 4: the first call is made by all eight workers together."""
    return init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "cp"))


@keeps_groups
def make_mesh(_group: Any) -> None:
    """For `pool.run(8, make_mesh)`: later tasks on fewer workers find the mesh made."""
    two_axes()

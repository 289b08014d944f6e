"""Groups alike as batch entries of one call: fewer calls, and work for every core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from sparse_attn.geometry import Geometry, Group

ROWS_AT_ONCE = 1 << 16
"""Rows of one attention call over groups alike: bounds the copies of their prefixes."""


def alike(geometry: Geometry, rows: int) -> Iterator[list[Group]]:
    """Runs of neighbouring groups of one document with as many rows and prefix keys: one call for `rows` of their rows."""

    def kind(group: Group) -> tuple[int, ...]:
        return group.document, group.count, *(b - a for a, b in group.prefix)

    for _, groups in groupby(geometry.groups, kind):
        found = list(groups)
        step = max(1, rows // found[0].count)
        for first in range(0, len(found), step):
            yield found[first : first + step]


def fold(x: Tensor, groups: int) -> Tensor:
    """(B, groups * rows, H, D) -> (B * groups, rows, H, D)."""
    return x.unflatten(1, (groups, -1)).flatten(0, 1)


def prefixes(x: Tensor, groups: Sequence[Group]) -> Tensor:
    """The prefixes of groups alike: (B * groups, keys, H, D)."""
    if not groups[0].prefix:
        return x[:, :0]
    if len(groups) == 1:
        parts = [x[:, a:b] for a, b in groups[0].prefix]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    each = torch.stack([torch.cat([x[:, a:b] for a, b in group.prefix], dim=1) for group in groups], dim=1)
    return each.flatten(0, 1)

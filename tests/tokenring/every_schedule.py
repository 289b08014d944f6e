"""Every schedule's name for a world, and masks of every kind: what the tests over all of them walk through."""

from __future__ import annotations

import tokenring as tr
from tokenring.schedules import BACKWARD, FORWARD


def schedule_names(world: int, backward: bool = False) -> list[str]:
    """Flat ones, and every mesh, usp and hybrid whose numbers fit."""
    names = [*(BACKWARD if backward else FORWARD), "ulysses"]
    for size in (d for d in range(1, world + 1) if world % d == 0):
        names += [f"mesh:{size}x{world // size}", f"usp:{size}x{world // size}"]
        if 1 < size < world:
            inner = ("ring", "biring", "tokenring", "gather", f"mesh:{size}x1", f"mesh:1x{size}")
            names += [f"hybrid:{outer}/{each}@{size}" for outer in ("ring", "tokenring") for each in inner]
            names.append(f"hybrid:ring/ulysses@{size}")
    return list(dict.fromkeys(names))


def masks(length: int, batch: int) -> dict[str, tr.Mask]:
    """One of every kind, and intersections, for `length` positions."""
    third = length // 3
    documents = tr.Mask.documents([0, third, third, length])
    whole = tr.Mask.documents([0, third, length], causal=False)
    spans = tr.Mask.spans([(1, max(1, third)), (third + 1, max(third + 1, length - 1))])
    lengths = tr.Mask.lengths([max(0, length - 3 * b) for b in range(batch)])
    return {
        "causal": tr.Mask.causal(),
        "full": tr.Mask.full(),
        "window": tr.Mask.window(4),
        "both-sided window": tr.Mask.window(3, 2),
        "documents": documents,
        "full documents": whole,
        "short documents": tr.Mask.documents([0, min(5, length), min(8, length), length]),
        "spans": spans,
        "lengths": lengths,
        "documents & window": documents & tr.Mask.window(2),
        "spans & documents": spans & whole,
        "lengths & causal": lengths & tr.Mask.causal(),
        "all of them": lengths & spans & whole & tr.Mask.window(6, 6),
    }


def layouts(length: int, world: int) -> list[tr.Layout]:
    """Every kind of layout."""
    kinds = (tr.Layout.zigzag, tr.Layout.contiguous, tr.Layout.striped)
    dealt = tr.Layout.balanced(tr.Mask.documents([0, length // 3, length]), length, world, block=2)
    return [*(kind(length, world) for kind in kinds), tr.Layout.striped(length, world, block=3), dealt]

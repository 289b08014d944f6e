"""Pictures of plans: which columns each group keeps, head by head, as PNG. Needs matplotlib, imported only here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparse_attn.stripes import StripePlan

CELLS = 512
"""Longest side of a map in pixels: keys and rows beyond are averaged."""


def stripe_map(plan: StripePlan, head: int, entry: int = 0) -> np.ndarray:
    """float32 (rows, columns), at most `CELLS` each way: the share of pairs in a cell that the head attends to."""
    if not (0 <= entry < plan.batch and 0 <= head < plan.q_heads):
        raise ValueError(
            f"got entry {entry}, head {head}; the plan has {plan.batch} batch entries and {plan.q_heads} heads"
        )
    g = plan.geometry
    height, width = min(CELLS, g.queries), min(CELLS, g.keys)
    total = np.zeros((height, width), dtype=np.float64)
    chosen = head if plan.share == "query" else head * plan.kv_heads // plan.q_heads
    edges = np.arange(g.keys) * width // g.keys
    for number, group in enumerate(g.groups):
        line = np.zeros(g.keys)
        for a, b in group.prefix:
            line[a:b] = 1
        line[plan.kept(group).cpu().numpy()] = 1
        line[plan.columns(number, entry, chosen).cpu().numpy()] = 1
        if plan.path == "dense":
            line[g.documents[group.document][1][0] : group.diagonal] = 1
        for row in range(*group.rows):
            line[group.diagonal + row - group.rows[0]] = 1
            total[row * height // g.queries] += np.bincount(edges, line, width)
    pairs = np.outer(np.bincount(np.arange(g.queries) * height // g.queries), np.bincount(edges))
    return (total / pairs).astype(np.float32)


def save_stripe_maps(plan: StripePlan, path: str | Path, heads: Sequence[int] | None = None, entry: int = 0) -> Path:
    """One picture of some heads (all where not given) side by side.

    Raises:
        ValueError: a head or batch entry that the plan lacks; matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("stripe maps need matplotlib, which is not installed; pip install matplotlib") from error
    chosen = range(plan.q_heads) if heads is None else heads
    if not len(chosen):
        raise ValueError(f"heads is {heads!r}; give one head or more of 0 to {plan.q_heads - 1}")
    figure = Figure(figsize=(3 * len(chosen), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, head in zip(np.atleast_1d(figure.subplots(1, len(chosen))), chosen):
        g = plan.geometry
        axis.imshow(stripe_map(plan, head, entry), cmap="Greys", vmin=0, vmax=1, extent=(0, g.keys, g.queries, 0))
        axis.set_title(f"head {head}")
        axis.set_xlabel("key")
    figure.suptitle(f"density {plan.density:.3f}")
    figure.savefig(path, dpi=100)
    return Path(path)

"""What a prefill costs, by the two formulas that papers use, and what a reduction saves of it.

    plain    per layer 4 n d^2 + 2 n^2 d + 2 n d m        DivPrune and most token-pruning papers
    gated    per layer 4 n d^2 + 2 n^2 d + 3 n d m        FastV, CATP; right for SwiGLU decoders with full key heads

n rows, width d, feed-forward m; multiply-adds. Grouped key heads: give `key_width`, the width of keys and values together / 2.
"""

from __future__ import annotations

from collections.abc import Sequence


def prefill(
    rows: float, *, layers: int, width: int, ffn: int, gated: bool = False, key_width: int | None = None
) -> float:
    """Multiply-adds of all layers.

    >>> prefill(2, layers=1, width=3, ffn=5)
    156.0
    """
    keys = width if key_width is None else key_width
    projections = 2 * rows * width * (width + keys)
    return layers * float(projections + 2 * rows**2 * width + (3 if gated else 2) * rows * width * ffn)


def by_layer(rows: Sequence[int], *, width: int, ffn: int, gated: bool = False) -> float:
    """The same where each layer has rows of its own, as under a layer policy."""
    return sum(prefill(n, layers=1, width=width, ffn=ffn, gated=gated) for n in rows)


DIVPRUNE_TEXTS = (15, 15, 23, 83, 25, 113, 15, 39, 21, 91, 57)
"""Text rows of the eleven tasks over which DivPrune's published shares are means."""

DIVPRUNE_SYSTEM = 35
"""Rows of the system prompt that its released code takes for granted before the picture."""


def divprune_share(visual: int, ratio: float, *, layers: int, width: int, ffn: int, system: int = 0) -> float:
    """DivPrune's published figure: FLOPs with `ratio` of `visual` rows kept over FLOPs with all, mean over its tasks.

    system: rows of the system prompt that count beside a task's text.

    >>> round(100 * divprune_share(576, 0.098, layers=32, width=4096, ffn=11008), 2)
    15.63
    """
    kept = round(ratio * visual)
    size = {"layers": layers, "width": width, "ffn": ffn}
    texts = [system + text for text in DIVPRUNE_TEXTS]
    shares = [prefill(text + kept, **size) / prefill(text + visual, **size) for text in texts]
    return sum(shares) / len(shares)

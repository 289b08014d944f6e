"""What stripes would cost beside dense attention, in units of one (query, key) pair of the flash operator.

    dense     causal pairs
    stripes   anchor pairs + kept candidate pairs + the test's products + rows gathered + calls

The constants are ratios, measured on one core of an x86 processor with 512-bit vectors (float32, D = 64, torch's flash operator
at 0.32 pairs a nanosecond); they decide when to fall back, and never what is computed.
"""

from __future__ import annotations

from sparse_attn.config import AnchorConfig
from sparse_attn.geometry import Geometry

CALL = 15_000.0
"""One gather, one operator call and its share of a merge: about 50 microseconds."""
GATHERED_ROW = 6.0
"""A row of keys and values copied: 19 ns."""
PRODUCT = 0.45
"""A product tested in the inputs' dtype, beside the two products and the exponential of attention."""
LIKELY_STRIPES = 0.05
"""Share of candidates kept, where nothing has been looked at yet."""
LIKELY_PASSED = 0.4
"""Share of candidates that pass the bound of `rescore`, where nothing has been looked at yet."""


def sparse_cost(geometry: Geometry, lists: int, config: AnchorConfig, kept: float, passed: float) -> float:
    """Pairs of one head that stripes cost; `kept` and `passed` are shares of the candidates, `lists` per group and head."""
    groups = sum(1 for g in geometry.groups if g.candidate_keys)
    rows = max(1, geometry.rows)
    gathered = kept * geometry.candidate_pairs / rows * GATHERED_ROW
    work = geometry.anchor_pairs + kept * geometry.candidate_pairs
    return work + gathered + test_cost(geometry, config, passed) + groups * lists * CALL


def test_cost(geometry: Geometry, config: AnchorConfig, passed: float) -> float:
    """Pairs of one head that identification costs."""
    pairs = geometry.candidate_pairs
    shares = {
        "pooled": 2 / geometry.block,
        "lse": 2 / geometry.block,
        "rescore": 2 / config.box + passed,
        "every": 1.0,
    }
    maximum = geometry.anchor_pairs if config.identify == "pooled" else 0
    return PRODUCT * (shares[config.identify] * pairs + maximum)


def groups_for(length: int) -> tuple[int, int]:
    """(block, step) for a sequence: eight blocks, about 4 sqrt(length) rows, 128 to 1024.

    Short groups choose better columns and keep the anchor region small; long ones make taller products and fewer calls.

    >>> groups_for(4096), groups_for(16384), groups_for(131072)
    ((32, 8), (64, 8), (128, 8))
    """
    rows = 128
    while rows < 1024 and rows * 2 <= 4 * length**0.5:
        rows *= 2
    return rows // 8, 8


def resolved(config: AnchorConfig, length: int) -> tuple[int, int]:
    """The (block, step) of a call whose longest document has `length` keys."""
    block, step = groups_for(length)
    rows = block * step
    if config.block != "auto":
        block, step = config.block, max(1, rows // config.block)
    return block, step if config.step == "auto" else config.step


def pays(geometry: Geometry, config: AnchorConfig) -> tuple[bool, str]:
    """Whether stripes are likely to beat dense attention before anything is computed, and in words why."""
    dense = geometry.causal_pairs
    share = 1.0 if config.share == "query" else 0.5
    sparse = sparse_cost(geometry, share, config, LIKELY_STRIPES, LIKELY_PASSED)
    said = f"modelled: {sparse / max(1, dense):.2f} of dense at {LIKELY_STRIPES:.0%} of the candidates"
    return sparse < dense, said

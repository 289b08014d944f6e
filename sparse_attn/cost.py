"""What stripes would cost beside dense attention, in units of one (query, key) pair of the flash operator.

    dense     causal pairs
    stripes   anchor pairs, which small pieces slow + kept candidate pairs + the test's products + rows gathered + calls

The constants are ratios, measured on one core of an x86 processor with 512-bit vectors (float32, D = 64, torch's flash operator
at 0.30 pairs a nanosecond; `python -m benchmarks.sparse_cost` measures them again and sets whole calls beside what they promise);
they decide when to fall back, and never what is computed.
"""

from __future__ import annotations

from functools import lru_cache

from sparse_attn.config import AnchorConfig
from sparse_attn.geometry import Geometry, Group
from sparse_attn.identify.products import EARLY
from tokenring.segments import Range

HEAD_DIM = 64
"""Of the measured pairs: calls weigh less beside pairs of more dims."""
WHOLE_CALL = 1_000_000.0
"""What every sparse call costs before its first group, the sample included: about three milliseconds."""
GROUP = 30_000.0
"""A group's share of identification, whatever its heads: about 100 microseconds."""
ANCHOR_PAIR = 1.6
"""A pair of an anchor region: its pieces are small, and read keys past the diagonal. 1.5 at 16,384 tokens, 2.1 at 8,192."""
KEPT_PAIR = 1.09
"""A pair of phase 3, without what follows: its row's gathering and its list's calls."""
CALL = 28_000.0
"""A list of phase 3, whatever its length: about 90 microseconds."""
LISTS_TESTED = 2
"""Calls' worth of a list that `rescore` tests: choosing, gathering and testing its keys. Groups of 256 rows take more."""
GATHERED_ROW = 12.0
"""A row of keys and values copied from all over memory: 40 ns."""
PRODUCT = 0.45
"""A product of a test in the inputs' dtype, beside the two products and the exponential of attention."""
TESTED = 0.23
"""A product of a test in bfloat16, where the processor multiplies it; else as `PRODUCT`."""
WORTH = 0.7
"""Stripes run where the model promises this share of dense or less: it leaves out cache misses and the sample's own time."""
SAMPLE_COLUMNS = 512
"""What is looked at before the rest is tested: about so many candidates in the middle of those of one late group."""
SAMPLE = 350_000.0
"""What a sample costs whatever its heads: about a millisecond."""
AFFORDABLE = 0.025
"""Share of dense attention that a sample may cost, which is lost where it speaks for dense."""
LIKELY_STRIPES = 0.1
"""Share of candidates kept, where nothing has been looked at yet."""
LIKELY_PASSED = 0.3
"""Share of candidates that pass the bound of `rescore`, where nothing has been looked at yet."""


def sparse_cost(
    geometry: Geometry, config: AnchorConfig, heads: int, dim: int, kept: float, passed: float, lists: float = 1.0
) -> float:
    """Pairs of one head that stripes cost.

    Args:
        heads: how many share a call's and a group's own costs: batch entries * query heads.
        dim: mean of the two head dims.
        kept, passed: shares of the candidates.
        lists: per query head of a group; less than one where heads share them.
    """
    groups = sum(1 for g in geometry.groups if g.candidate_keys)
    gathered = lists * kept * geometry.candidate_pairs / max(1, geometry.rows) * GATHERED_ROW
    work = ANCHOR_PAIR * geometry.anchor_pairs + KEPT_PAIR * kept * geometry.candidate_pairs
    each = (1 + LISTS_TESTED) * CALL if config.identify == "rescore" else CALL
    calls = (WHOLE_CALL + groups * GROUP) / max(1, heads) + groups * lists * each
    return work + gathered + test_cost(geometry, config, kept, passed) + calls * HEAD_DIM / dim


def test_cost(geometry: Geometry, config: AnchorConfig, kept: float, passed: float) -> float:
    """Pairs of one head that identification costs. What is kept is mostly found by the rows that ask first."""
    pairs = geometry.candidate_pairs
    left = max(0.0, passed - kept) * (EARLY - 1) / EARLY
    tested = TESTED if config.scores == "auto" else PRODUCT
    shares = {
        "pooled": tested * 2 / geometry.block,
        "lse": tested * 2 / geometry.block,
        "rescore": tested * (4 / config.box + passed / EARLY + left),
        "every": tested,
    }
    return shares[config.identify] * pairs


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


def sampled(geometry: Geometry, group: Group) -> Range:
    """The middle of a group's candidates: so many that they, initial block and window make whole groups."""
    around, (first, last) = geometry.initial + geometry.window, group.candidates
    whole = max(around // geometry.rows + 1, round((SAMPLE_COLUMNS + around) / geometry.rows))
    count = min(whole, (last - first + around) // geometry.rows) * geometry.rows - around
    start = first + (last - first - count) // 2
    return start, start + count


def sample_cost(geometry: Geometry, config: AnchorConfig, heads: int, dim: int, threads: int) -> float:
    """Pairs of one head that looking at one group costs: too little work to share among threads, which dense attention has."""
    region = geometry.rows * (geometry.rows / 2 + geometry.initial + geometry.window) * ANCHOR_PAIR
    tests = PRODUCT * geometry.rows * SAMPLE_COLUMNS * (4 / config.box + LIKELY_PASSED)
    return threads * (region + tests + SAMPLE / max(1, heads) * HEAD_DIM / dim)


@lru_cache(maxsize=512)
def pays(geometry: Geometry, config: AnchorConfig, heads: int, dim: int, threads: int = 1) -> tuple[bool, str]:
    """Whether stripes are likely to beat dense attention before anything is computed, and in words why."""
    dense = geometry.causal_pairs
    sample = sample_cost(geometry, config, heads, dim, threads)
    if sample > AFFORDABLE * dense:
        return False, f"modelled: to look at a sample would cost {sample / max(1, dense):.0%} of dense"
    sparse = sparse_cost(geometry, config, heads, dim, LIKELY_STRIPES, LIKELY_PASSED)
    said = f"modelled: {sparse / max(1, dense):.2f} of dense at {LIKELY_STRIPES:.0%} of the candidates"
    return sparse < WORTH * dense, said

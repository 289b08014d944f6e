"""Tables and JSON of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.linklab.measure import Result
from benchmarks.linklab.raw import PatternTime

RINGS = ("ring", "ring:direct")
"""The one-way ring, forward and backward: what the others are set beside."""


def cell_table(result: Result) -> str:
    """One cell: each schedule beside its bound and its simulation."""
    ring = next((row for row in result.rows if row.schedule in RINGS), None)
    lines = [
        f"{result.cell.title}: raw sockets reach {result.raw_share:.1%} of the rate, "
        f"computing alone {result.compute_seconds:.3f} s",
        f"  {'schedule':<28} {'MB':>7} {'measured':>9} {'spread':>15} {'bound':>7} {'over bound':>10} {'simulated':>9} {'of ring':>7}",
    ]
    for row in result.rows:
        of_ring = f"{row.measured / ring.measured:.3f}" if ring else "-"
        spread = f"{min(row.runs):.3f} to {max(row.runs):.3f}"
        lines.append(
            f"  {row.schedule:<28} {row.bytes_sent / 1e6:>7.1f} {row.measured:>9.3f} {spread:>15} {row.bound:>7.3f} "
            f"{row.over_bound:>10.3f} {row.simulated:>9.3f} {of_ring:>7}"
        )
    lines.append(
        f"  best {result.best.schedule}; auto took {result.auto}, {result.auto_over_best:.2f} of the best's time"
    )
    return "\n".join(lines)


def grid_table(results: Sequence[Result]) -> str:
    """All cells: who was best, what auto took; then where TokenRing loses; then how the claims stand."""
    heads = f"  {'cell':<62} {'best':<28} {'s':>6} {'auto':<28} {'of best':>7} {'tokenring of best other':>24}"
    rows = []
    for result in results:
        rival = _rival(result)
        compared = f"{rival[0]:.2f} {rival[1]}" if rival else "-"
        rows.append(
            f"  {result.cell.title:<62} {result.best.schedule:<28} {result.best.measured:>6.3f} {result.auto:<28} "
            f"{result.auto_over_best:>7.2f} {compared:>24}"
        )
    lost = [row for row, result in zip(rows, results) if (rival := _rival(result)) and rival[0] > 1]
    shown = ["Grid, medians", heads, *rows]
    shown += ["", f"Where TokenRing loses ({len(lost)} of {len(results)} cells)", heads, *lost]
    return "\n".join([*shown, "", *claims(results)])


def claims(results: Sequence[Result]) -> list[str]:
    """The figures that decide whether the lab, the model and "auto" hold."""
    rows = [(row, result) for result in results for row in result.rows]
    worst, where = max(rows, key=lambda pair: pair[0].over_bound)
    lines = [
        f"over the bound: mean {statistics.mean(row.over_bound for row, _ in rows):.3f}, worst {worst.over_bound:.3f} "
        f"({worst.schedule}, {where.cell.title}); within 15%: {sum(row.over_bound <= 1.15 for row, _ in rows)} of {len(rows)}"
    ]
    errors = [(abs(row.simulated / row.measured - 1), row, result) for row, result in rows]
    error, row, result = max(errors, key=lambda found: found[0])
    lines.append(
        f"simulate() off by {statistics.mean(each for each, _, _ in errors):.1%} on average, {error:.1%} at worst "
        f"({row.schedule}, {result.cell.title})"
    )
    lines += _won(results)
    picks = [result.auto_over_best for result in results]
    lines.append(
        f"auto within 5% of the best in {sum(pick <= 1.05 for pick in picks)} of {len(picks)} cells, worst {max(picks):.2f}"
    )
    return lines


def _won(results: Sequence[Result]) -> Iterator[str]:
    """In how many cells TokenRing was faster than the rings, and than all others."""
    for name in ("ring", "ring:direct", "biring", None):
        compared = [found for result in results if (found := _rival(result, name))]
        if compared:
            wins = sum(share < 1 for share, _ in compared)
            yield f"tokenring faster than {name or 'every other'} in {wins} of {len(compared)} cells"


def pattern_table(title: str, found: Iterable[PatternTime]) -> str:
    """Raw sockets and gloo beside the bound, in seconds."""
    lines = [
        title,
        f"  {'pattern':<24} {'bound':>7} {'sockets':>8} {'gloo, receives first':>21} {'gloo, sends first':>18}",
    ]
    lines += [
        f"  {p.pattern:<24} {p.bound:>7.3f} {p.sockets:>8.3f} {p.gloo_receives_first:>21.3f} {p.gloo_sends_first:>18.3f}"
        for p in found
    ]
    return "\n".join(lines)


def _rival(result: Result, name: str | None = None) -> tuple[float, str] | None:
    """TokenRing's time over that of a schedule, or of the best other one, and its name."""
    ours = [row for row in result.rows if row.schedule == "tokenring"]
    others = [row for row in result.rows if (row.schedule == name if name else row.schedule != "tokenring")]
    if not ours or not others:
        return None
    best = min(others, key=lambda row: row.measured)
    return ours[0].measured / best.measured, best.schedule

"""Which heads a rank computes where heads are spread: as even as can be, none where there are fewer heads than ranks."""

from __future__ import annotations

from tokenring.plans.problem import Problem
from tokenring.segments import Range


def head_range(problem: Problem, parts: int, rank: int) -> Range:
    """The query heads of a rank."""
    index = rank % parts
    return index * problem.q_heads // parts, (index + 1) * problem.q_heads // parts


def heads_of(problem: Problem, what: str, heads: Range) -> Range:
    """The heads of a kind of rows ("q" or "kv") that some query heads need."""
    return heads if what == "q" else problem.key_heads(heads)


def blocks(problem: Problem, parts: int, rank: int) -> tuple[Range, ...]:
    """A rank's query heads, cut so that each part is whole key groups or lies in one."""
    first, last = head_range(problem, parts, rank)
    group = problem.q_heads // problem.kv_heads
    inner = (-(-first // group) * group, last // group * group)
    if first == last or inner[0] > inner[1] or (first, last) == inner:
        return ((first, last),) if first < last else ()
    return tuple((a, b) for a, b in ((first, inner[0]), inner, (inner[1], last)) if a < b)

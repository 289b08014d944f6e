"""How many tokens to keep, said before any data is seen.

A budget is a ratio or a count, and it always speaks of one item (one image, one video, or one window of a video):

    ratio r   keep max(1, round(r * n)) of the item's n tokens    (Python's round: halves go to the even neighbour)
    count k   keep min(k, n): a count above the item's length keeps the whole item

A method may have its own rule on top (`evs` floors and never keeps less than one frame of a ratio, `pool` keeps a whole
number of cells per frame): ask `method.count(grid, budget)`, which is exact.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_FORMS = "a ratio as 0.1 or 10%, or a count of tokens per item as 64"


@dataclass(frozen=True)
class Budget:
    """A share or a number of tokens to keep in each item. Made by `Budget.ratio`, `Budget.count` or `Budget.parse`.

    >>> Budget.ratio(0.1).tokens(577), Budget.count(64).tokens(577), Budget.count(64).tokens(49)
    (58, 64, 49)
    """

    kind: str
    """"ratio" or "count"."""
    value: float
    """The share in (0, 1], or the whole number of tokens."""

    def __post_init__(self) -> None:
        if self.kind not in ("ratio", "count"):
            raise ValueError(
                f"a budget is of kind 'ratio' or 'count', got {self.kind!r}; use Budget.ratio or Budget.count"
            )
        number = not isinstance(self.value, bool) and isinstance(self.value, int | float)
        if self.kind == "ratio" and not (number and 0.0 < self.value <= 1.0):
            raise ValueError(
                f"a budget ratio is the share of tokens kept, above 0 and at most 1, got {self.value!r}; "
                "write 0.1 or 10%, or give a count as a whole number"
            )
        if self.kind == "count" and not (number and isinstance(self.value, int) and self.value >= 1):
            raise ValueError(
                f"a budget count is a whole number of tokens per item, at least 1, got {self.value!r}; raise it to 1 or more"
            )

    @classmethod
    def ratio(cls, ratio: float) -> Budget:
        """Keep the share `ratio`, in (0, 1], of every item."""
        return cls("ratio", ratio)

    @classmethod
    def count(cls, count: int) -> Budget:
        """Keep `count` tokens of every item (all of an item that has fewer)."""
        return cls("count", count)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "0.1" or "10%" as a ratio and "64" as a count: a dot or % makes a ratio, so "1.0" is all, "1" one token.

        >>> Budget.parse("25%"), Budget.parse("64")
        (Budget.ratio(0.25), Budget.count(64))
        """
        text = text.strip()
        if re.fullmatch(r"[0-9]+", text):
            return cls.count(int(text))
        if re.fullmatch(r"([0-9]+\.[0-9]*|\.[0-9]+)", text):
            return cls.ratio(float(text))
        if re.fullmatch(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)%", text):
            return cls.ratio(float(text[:-1]) / 100)
        raise ValueError(f"the budget {text!r} is not a number that can be read; give {_FORMS}")

    def tokens(self, length: int) -> int:
        """Tokens kept of an item of `length` tokens; 0 only for an item that has none."""
        if length == 0:
            return 0
        if self.kind == "count":
            return min(int(self.value), length)
        return max(1, round(self.value * length))

    def __repr__(self) -> str:
        return f"Budget.{self.kind}({self.value!r})"

    def __str__(self) -> str:
        return str(self.value) if self.kind == "count" else str(float(self.value))


def windows(total_frames: int, window: int) -> list[tuple[int, int]]:
    """Cut frames 0..total_frames-1 into half-open runs (first, last) of `window` frames; the last may be shorter.

    Reducing a long video window by window keeps memory flat in its length; the cuts depend on nothing but these two
    numbers, so every world gives the same result.

    >>> windows(10, 4)
    [(0, 4), (4, 8), (8, 10)]
    """
    if total_frames < 1:
        raise ValueError(
            f"a video to be cut into windows has at least 1 frame, got {total_frames}; check the frame range"
        )
    if window < 1:
        raise ValueError(f"a window holds at least 1 frame, got {window}; give a positive number of frames")
    return [(first, min(first + window, total_frames)) for first in range(0, total_frames, window)]


def split_budget(budget: Budget, counts: Sequence[int]) -> list[Budget]:
    """One budget for each window, given the number of tokens in each window.

    A ratio holds for every window as it is. A count k is a count of the whole: window i gets the share
    k * counts[i] / sum(counts), rounded by largest remainder (ties to the earlier window), at least 1 each; the parts sum
    to min(k, sum(counts)) exactly.

    Raises: ValueError where k is below the number of windows, or a window is empty.

    >>> split_budget(Budget.count(10), [100, 100, 50])
    [Budget.count(4), Budget.count(4), Budget.count(2)]
    """
    counts = [int(n) for n in counts]
    if not counts or min(counts) < 1:
        raise ValueError(
            f"every window needs at least 1 token to share a budget, got {counts}; leave out empty windows"
        )
    if budget.kind == "ratio":
        return [budget] * len(counts)
    total = min(int(budget.value), sum(counts))
    if total < len(counts):
        raise ValueError(
            f"a budget of {total} tokens cannot give each of {len(counts)} windows at least 1; "
            f"raise it to {len(counts)} or more, or use longer windows"
        )
    return [Budget.count(part) for part in _apportion(total, counts)]


def apportion(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """`total` shared in proportion to `weights` >= 0 by largest remainder, ties to the earlier part, none above its cap.

    >>> apportion(10, [1.0, 1.0, 8.0], [5, 5, 5])
    [3, 2, 5]
    """
    parts, open_ = [0] * len(weights), [i for i, cap in enumerate(caps) if cap]
    left = total
    while left and open_:
        whole = sum(weights[i] for i in open_)
        share = {i: left * weights[i] / whole if whole > 0 else left / len(open_) for i in open_}
        full = [i for i in open_ if share[i] >= caps[i] - parts[i]]
        if full:
            left -= sum(caps[i] - parts[i] for i in full)
            parts = [caps[i] if i in full else part for i, part in enumerate(parts)]
            open_ = [i for i in open_ if i not in full]
            continue
        extra = sorted(open_, key=lambda i: (int(share[i]) - share[i], i))[: left - sum(map(int, share.values()))]
        for i in open_:
            parts[i] += int(share[i]) + (i in extra)
        return parts
    return parts


def _apportion(total: int, counts: list[int]) -> list[int]:
    """Largest remainder in integers; windows that would get nothing get 1 first, and the rest is shared again."""
    poor: set[int] = set()
    while True:
        rich = [i for i in range(len(counts)) if i not in poor]
        left, whole = total - len(poor), sum(counts[i] for i in rich)
        parts = {i: left * counts[i] // whole for i in rich}
        by_remainder = sorted(rich, key=lambda i: (-(left * counts[i] % whole), i))
        for i in by_remainder[: left - sum(parts.values())]:
            parts[i] += 1
        starved = {i for i in rich if parts[i] == 0}
        if not starved:
            assert sum(parts.values()) + len(poor) == total
            return [1 if i in poor else parts[i] for i in range(len(counts))]
        poor |= starved

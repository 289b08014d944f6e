"""What an AnchorAttention call can be told, as one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

IDENTIFY = ("pooled", "lse", "rescore", "every")
SHARE = ("query", "key")
DENSE = ("auto", "never")
SCORES = ("auto", "input")


@dataclass(frozen=True, kw_only=True)
class AnchorConfig:
    """How stripes are found, and for how many rows at a time.

    >>> AnchorConfig(theta=2.0, block=64).identify, AnchorConfig.paper().identify
    ('rescore', 'pooled')
    """

    theta: float | tuple[float, ...] = 6.0
    """A column is kept where anchor - score <= theta for a row that counts, natural-log units; larger keeps more. One number,
    or one for each query head. Infinity keeps every column, -infinity none. Its useful values depend on `identify`."""
    block: int | str = "auto"
    """Rows that `pooled` and `lse` average; keys of the initial block and of the window before a group. "auto": by length."""
    step: int | str = "auto"
    """Blocks in a group: block * step rows share one list of columns. "auto": by length."""
    identify: str = "rescore"
    """"pooled" (the paper), "lse", "rescore" or "every"; see `sparse_attn.identify`."""
    share: str = "query"
    """"query": every query head selects for itself. "key": the query heads of one key head share the union."""
    dense: str = "auto"
    """"auto": plain attention where the cost model says that stripes would not pay. "never": always stripes."""
    box: int = 32
    """`rescore`: rows that share one box in the bound."""
    reach: float = 0.25
    """`rescore`: how much of a box's half width the bound counts. 1 is a true bound and keeps most columns; less is a guess that
    lets fewer through to the exact test."""
    last: int = 64
    """`rescore`: so many last rows of each document, a group's at most, are asked about every column, whatever the bound:
    generation goes on from them. With 0, chunks of a prompt that end where groups end keep exactly the columns that one call keeps."""
    scores: str = "auto"
    """Products of the tests that choose columns: "input" in the dtype of q and k; "auto" in bfloat16 for float32 inputs on a
    processor that multiplies it faster. They choose columns; attention itself is always in the inputs' dtype."""

    def __post_init__(self) -> None:
        self._check_thetas()
        for name, least in (("block", 1), ("step", 1), ("box", 1), ("last", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            by_length = name in ("block", "step")
            if not (whole and value >= least) and not (value == "auto" and by_length):
                allowed = f"give a whole number of {least} or more" + (', or "auto"' if by_length else "")
                raise ValueError(f"{name} is {value!r}; {allowed}")
        for name, names in (("identify", IDENTIFY), ("share", SHARE), ("dense", DENSE), ("scores", SCORES)):
            if getattr(self, name) not in names:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give one of {', '.join(names)}")
        if not (isinstance(self.reach, Real) and 0 <= self.reach <= 1):
            raise ValueError(f"reach is {self.reach!r}; give a number from 0 to 1 (1: a true bound)")

    def _check_thetas(self) -> None:
        if isinstance(self.theta, list):
            object.__setattr__(self, "theta", tuple(self.theta))
        thetas = self.theta if isinstance(self.theta, tuple) else (self.theta,)
        if not thetas or any(isinstance(t, bool) or not isinstance(t, Real) or math.isnan(t) for t in thetas):
            raise ValueError(
                f"theta is {self.theta!r}; give a number (infinity keeps all columns) or one per query head"
            )
        plain = tuple(float(t) for t in thetas)  # numpy's numbers cannot be written as JSON
        object.__setattr__(self, "theta", plain if isinstance(self.theta, tuple) else plain[0])

    @classmethod
    def paper(cls) -> AnchorConfig:
        """The paper's setting (arXiv 2505.23520): block 128, step 16, theta 12, mean queries against the mean row maximum."""
        return cls(theta=12.0, block=128, step=16, identify="pooled", share="query", dense="never", scores="input")

    def thetas(self, q_heads: int) -> tuple[float, ...]:
        """One theta for each query head."""
        thetas = self.theta if isinstance(self.theta, tuple) else (self.theta,) * q_heads
        if len(thetas) != q_heads:
            raise ValueError(
                f"theta has {len(thetas)} numbers and q has {q_heads} heads; give one number, or one per head"
            )
        return tuple(float(t) for t in thetas)

"""What an option may be, checked for every method alike: its kind from the annotation, its range from the method's `limits`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; without the two themselves where it is open.

    >>> str(Range(1)), str(Range(0, open=True)), str(Range(0, 1)), 1.0 in Range(0, 1)
    ('of 1 or more', 'above 0', 'from 0 to 1', True)
    """

    low: float = -math.inf
    high: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low < value < self.high if self.open else self.low <= value <= self.high

    def __str__(self) -> str:
        if math.isfinite(self.high):
            return f"between {self.low} and {self.high}" if self.open else f"from {self.low} to {self.high}"
        if math.isfinite(self.low):
            return f"above {self.low}" if self.open else f"of {self.low} or more"
        return ""


SHARE, COUNT, POSITIVE, COSINE = Range(0, 1), Range(1), Range(0, open=True), Range(-1, 1)
Limits = Mapping[str, Range | tuple[str, ...]]
"""By option: the range of a number, or the words that are allowed."""

_ANY = Range()
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number", lambda value: isinstance(value, Integral) and not isinstance(value, bool)),
    "float": ("a finite number", lambda value: isinstance(value, Real) and not isinstance(value, bool)),
    "str": ("a word", lambda value: isinstance(value, str)),
    "None": ("None", lambda value: value is None),
}


def check_options(method: Any, name: str, limits: Limits, idle: Mapping[str, str]) -> None:
    """ValueError that names the first option of a dataclass whose kind or range does not fit, or which is idle: `idle` says by
    option beside what."""
    for field in fields(method):
        value, kinds = getattr(method, field.name), str(field.type).split(" | ")
        if not all(kind in _KINDS for kind in kinds):
            continue
        span = limits.get(field.name, _ANY)
        if not any(_fits(value, kind, span) for kind in kinds):
            allowed = " or ".join(_allowed(kind, span) for kind in kinds)
            raise ValueError(f"{name} got {field.name}={value!r}; give {allowed}")
    for option, where in idle.items():
        if getattr(method, option) != type(method).__dataclass_fields__[option].default:
            raise ValueError(
                f"{name} got {option}={getattr(method, option)!r}, which {where} does not look at; leave it out"
            )


def _fits(value: Any, kind: str, span: Range | tuple[str, ...]) -> bool:
    if not _KINDS[kind][1](value):
        return False
    if kind in ("int", "float"):
        return math.isfinite(value) and value in span
    return kind != "str" or span is _ANY or value in span


def _allowed(kind: str, span: Range | tuple[str, ...]) -> str:
    if kind == "str" and isinstance(span, tuple):
        return " or ".join(span)
    return f"{_KINDS[kind][0]} {span}".strip() if kind in ("int", "float") else _KINDS[kind][0]

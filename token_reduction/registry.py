"""Methods by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from token_reduction.budget import Budget
from token_reduction.reducer import Reducer
from token_reduction.reducers.divprune import DivPrune
from token_reduction.reducers.evs import EVS
from token_reduction.reducers.identity import Identity
from token_reduction.reducers.pool import Pool
from token_reduction.reducers.random import Random
from token_reduction.reducers.uniform import Uniform

_REDUCERS: tuple[type[Reducer], ...] = (Identity, Uniform, Random, Pool, DivPrune, EVS)


def methods() -> tuple[str, ...]:
    """Names of all methods.

    >>> methods()
    ('identity', 'uniform', 'random', 'pool', 'divprune', 'evs')
    """
    return tuple(reducer.name for reducer in _REDUCERS)


def build(name: str, **options: Any) -> Reducer:
    """The method `name` with its options; every method takes `variant="best" | "paper" | "released"`.

    Raises: ValueError for a name or an option that does not exist.

    >>> build("divprune", center=True)
    DivPrune(variant='best', center=True)
    """
    reducer = _find(name)
    allowed = [field.name for field in fields(reducer)]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)}; its options are {', '.join(allowed)}")
    return reducer(**options)


def parse(text: str) -> tuple[str, Budget]:
    """Read "METHOD:BUDGET": a budget with a dot or % is a ratio of the tokens, a whole number a count per item.

    "identity" stands alone and gives Budget.ratio(1.0).

    >>> parse("divprune:0.1"), parse("uniform:64")
    (('divprune', Budget.ratio(0.1)), ('uniform', Budget.count(64)))
    >>> parse("evs:25%"), parse("identity")
    (('evs', Budget.ratio(0.25)), ('identity', Budget.ratio(1.0)))
    """
    name, colon, value = (part.strip() for part in text.partition(":"))
    reducer = _find(name)
    if reducer is Identity:
        if colon:
            raise ValueError(f"identity keeps every token and takes no budget, got {text!r}; write identity")
        return name, Budget.ratio(1.0)
    if not value:
        raise ValueError(f"{name} needs a budget, got {text!r}; write {name}:0.1, {name}:10% or {name}:64")
    return name, Budget.parse(value)


def _find(name: str) -> type[Reducer]:
    for reducer in _REDUCERS:
        if reducer.name == name:
            return reducer
    raise ValueError(f"unknown reduction method {name!r}; methods are {', '.join(methods())}")

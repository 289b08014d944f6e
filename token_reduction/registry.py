"""Methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from token_reduction.budget import Budget
from token_reduction.reducer import Reducer
from token_reduction.reducers.aim import Aim
from token_reduction.reducers.catp import Catp
from token_reduction.reducers.cdpruner import CDPruner
from token_reduction.reducers.centerclip import CenterCLIP
from token_reduction.reducers.correlation import Correlation
from token_reduction.reducers.dart import Dart
from token_reduction.reducers.density import SeTok, Vmtc
from token_reduction.reducers.difffp import DiffFP
from token_reduction.reducers.divprune import DivPrune
from token_reduction.reducers.downsample import Downsample
from token_reduction.reducers.dycoke import DyCoke
from token_reduction.reducers.evs import EVS
from token_reduction.reducers.facility import Facility
from token_reduction.reducers.fastvid import FastVID
from token_reduction.reducers.globalcom2 import GlobalCom2
from token_reduction.reducers.hiprune import HiPrune
from token_reduction.reducers.holitom import HoliTom
from token_reduction.reducers.identity import Identity
from token_reduction.reducers.image_text import ImageText
from token_reduction.reducers.mmtok import MMTok
from token_reduction.reducers.pool import Pool
from token_reduction.reducers.prumerge import PruMerge, PruMergePlus
from token_reduction.reducers.random import Random
from token_reduction.reducers.todre import ToDRE
from token_reduction.reducers.token_transforming import TokenTransforming
from token_reduction.reducers.tome import ToMe
from token_reduction.reducers.uniform import Uniform
from token_reduction.reducers.vflowopt import VFlowOpt
from token_reduction.reducers.vidcom2 import VidCom2
from token_reduction.reducers.visionzip import VisionDrop, VisionZip
from token_reduction.reducers.vispruner import VisPruner
from token_reduction.reducers.vtc_cls import VtcCls

_REDUCERS: tuple[type[Reducer], ...] = (
    *(Identity, Uniform, Random, Pool, Downsample),
    *(DivPrune, ToDRE, Facility, MMTok, Catp, CDPruner, Dart),
    *(VtcCls, HiPrune, GlobalCom2, VisPruner, ImageText, Correlation),
    *(VisionZip, VisionDrop, PruMerge, PruMergePlus, TokenTransforming, VFlowOpt),
    *(Aim, ToMe, SeTok, Vmtc, CenterCLIP),
    *(EVS, DiffFP, VidCom2, DyCoke, FastVID, HoliTom),
)


@dataclass(frozen=True)
class Method:
    """What is known of a method before it is built, in its default form."""

    name: str
    needs: tuple[str, ...]
    """Channels that tokens must carry."""
    cost: str
    """Work and memory in n tokens, k kept, width D, T frames of N."""
    source: str
    form: str
    """"authors'" or "ours" (the publication leaves the algorithm open)."""
    scope: str
    """"frame": every frame alone; "item": the whole item."""
    merges: bool
    """Whether rows may be made of several tokens."""


def methods() -> Mapping[str, Method]:
    """Every method, by name, in a fixed order.

    >>> list(methods())[:5]
    ['identity', 'uniform', 'random', 'pool', 'downsample']
    >>> methods()["visionzip"].needs, methods()["token_transforming"].form
    (('cls_attn', 'keys'), 'ours')
    """
    return MappingProxyType({reducer.name: _describe(reducer()) for reducer in _REDUCERS})


def _describe(method: Reducer) -> Method:
    scope = getattr(method, "scope", "item")
    needs = tuple(sorted(method.needs))
    return Method(method.name, needs, method.cost, method.source, method.form, scope, method.merges)


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
    reducer, options, budget = _read(text)
    if options:
        raise ValueError(f"{text!r} has options, which this does not read; use from_spec")
    return reducer.name, budget


def from_spec(text: str) -> tuple[Reducer, Budget]:
    """Read "METHOD:BUDGET" or "METHOD,option=value,...:BUDGET" and build the method.

    Values are true, false, none, numbers or words, as the option wants.

    >>> from_spec("cdpruner,relevance=false:0.1")
    (CDPruner(variant='best', relevance=False, block=None), Budget.ratio(0.1))
    """
    reducer, options, budget = _read(text)
    return build(reducer.name, **options), budget


def _read(text: str) -> tuple[type[Reducer], dict[str, Any], Budget]:
    head, colon, value = (part.strip() for part in text.partition(":"))
    name, *pairs = (part.strip() for part in head.split(","))
    reducer = _find(name)
    wrong = [pair for pair in pairs if not all(pair.partition("="))]
    if wrong:
        raise ValueError(f"an option is written name=value, got {wrong[0]!r} in {text!r}")
    options: dict[str, Any] = {}
    for key, _, word in (pair.partition("=") for pair in pairs):
        if key.strip() in options:
            raise ValueError(f"{text!r} gives the option {key.strip()} twice; give it once")
        options[key.strip()] = _value(word.strip())
    if reducer is Identity:
        if colon:
            raise ValueError(f"identity keeps every token and takes no budget, got {text!r}; write identity")
        return reducer, options, Budget.ratio(1.0)
    if not value:
        raise ValueError(f"{name} needs a budget, got {text!r}; write {name}:0.1, {name}:10% or {name}:64")
    return reducer, options, Budget.parse(value)


def _value(word: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if word.lower() in words:
        return words[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def _find(name: str) -> type[Reducer]:
    for reducer in _REDUCERS:
        if reducer.name == name:
            return reducer
    raise ValueError(f"unknown reduction method {name!r}; methods are {', '.join(r.name for r in _REDUCERS)}")

"""Base of the configuration sections: fields that know their flag, checks whose messages carry the dotted name."""

from __future__ import annotations

import math
from dataclasses import MISSING, field, fields
from typing import Any, ClassVar

from launch.errors import ConfigError


def option(flag: str | None = None, default: Any = MISSING) -> Any:
    """A field with its command-line flag; None: reachable by file and `--set` only."""
    return field(default=default, metadata={"flag": flag})


WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "tuple[str, ...]": "a list of names",
}


def of_type(value: Any, declared: str) -> bool:
    """Whether a value fits the type a field declares; a whole number also fits `float`, `True` fits `bool` only."""
    kind = declared.removesuffix(" | None")
    if value is None:
        return kind != declared
    if kind == "tuple[str, ...]":
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return kind == "bool"
    return isinstance(value, {"str": str, "int": int, "float": (int, float), "bool": bool}[kind])


class Section:
    """Base of the sections: error messages that carry the dotted name of the field."""

    section: ClassVar[str]

    def check_types(self) -> None:
        """Raise unless every field holds the type it declares."""
        for setting in fields(self):
            if not of_type(getattr(self, setting.name), str(setting.type)):
                raise self.refuse(setting.name, f"it must be {WORDS[str(setting.type).removesuffix(' | None')]}")

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the settings that are not at their default."""
        return tuple(s.name for s in fields(self) if getattr(self, s.name) != s.default)

    def refuse(self, name: str, rule: str) -> ConfigError:
        """One line: what was given, what is allowed."""
        return ConfigError(f"{self.section}.{name} is {getattr(self, name)!r}: {rule}")

    def one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        """Raise unless the field is one of `allowed`."""
        if getattr(self, name) not in allowed:
            raise self.refuse(name, f"it must be one of {', '.join(allowed)}")

    def within(self, name: str, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
        """Raise unless the field is None or a finite number in [low, high], or (low, high] with `open_low`."""
        value = getattr(self, name)
        if value is None:
            return
        if not math.isfinite(value) or value > high or value < low or (open_low and value == low):
            floor = f"above {low:g}" if open_low else f"{low:g} or more"
            raise self.refuse(name, f"it must be {floor}" + ("" if high == math.inf else f" and at most {high:g}"))

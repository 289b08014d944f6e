"""Settings from four places become one configuration: default < file < flag < `--set`, and each value remembers which.

>>> resolved = resolve(flags={"video.paths": ("a.mp4",), "engine.nproc": 2}, sets=["engine.nproc=4"])
>>> resolved.config.engine.nproc, resolved.origin["engine.nproc"], resolved.origin["model.source"]
(4, '--set', 'default')
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from launch.config import SECTIONS, RunConfig, settings
from launch.errors import ConfigError, one_line
from launch.section import WORDS, of_type

DEFAULT = "default"


@dataclass(frozen=True)
class Resolved:
    """A configuration and where each of its values came from."""

    config: RunConfig
    origin: dict[str, str]
    """Dotted name -> default, file NAME, flag such as --fps, or --set."""

    def table(self) -> dict[str, dict[str, Any]]:
        """`{"engine.nproc": {"value": 4, "from": "--nproc"}, ...}`, JSON safe, for reports."""
        return described(self.config, self.origin)


def described(config: RunConfig, origin: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Every setting with its value and where it came from; a name absent from `origin` was set in Python."""
    values = asdict(config)
    table = {}
    for name in settings():
        section, key = name.split(".")
        value = values[section][key]
        table[name] = {"value": list(value) if isinstance(value, tuple) else value, "from": origin.get(name, "python")}
    return table


def resolve(
    *, file: str | Path | None = None, flags: Mapping[str, Any] | None = None, sets: Iterable[str] = ()
) -> Resolved:
    """Join the layers.

    Args:
        file: YAML file of sections (`video: {fps: 2}`).
        flags: dotted name -> value as the command line parsed it; None values are flags that were not given.
        sets: texts `section.name=value`.

    Raises:
        ConfigError: unreadable file, unknown name (with the nearest legal ones), value of the wrong type or range.
    """
    values: dict[str, Any] = {}
    origin = dict.fromkeys(settings(), DEFAULT)
    layers = [(_from_file(Path(file)), f"file {file}")] if file is not None else []
    layers.append(({name: value for name, value in (flags or {}).items() if value is not None}, ""))
    layers.append((dict(_from_text(text) for text in sets), "--set"))
    for layer, source in layers:
        for name, value in layer.items():
            values[name] = value
            origin[name] = source or _flag_of(settings()[name])
    sections = {
        section: cls(**{name.split(".")[1]: value for name, value in values.items() if name.startswith(section + ".")})
        for section, cls in SECTIONS.items()
    }
    return Resolved(RunConfig(**sections), origin)


@cache
def help_texts() -> dict[str, str]:
    """The docstring under each field of a section, by dotted name: the one text for code and command line."""
    texts = {}
    sections = {cls.__name__: name for name, cls in SECTIONS.items()}
    homes = dict.fromkeys(inspect.getmodule(cls) for cls in SECTIONS.values())
    for node in (node for home in homes for node in ast.parse(inspect.getsource(home)).body):
        if not isinstance(node, ast.ClassDef) or node.name not in sections:
            continue
        for statement, after in zip(node.body, node.body[1:]):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                texts[f"{sections[node.name]}.{statement.target.id}"] = inspect.cleandoc(after.value.value)
    return texts


def legal(name: str, source: str) -> Field:
    """The field of a dotted name, or ConfigError with the nearest legal names."""
    known = settings()
    if name in known:
        return known[name]
    tails = {full.split(".")[1]: full for full in known}
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    near += [tails[tail] for tail in difflib.get_close_matches(name.split(".")[-1], tails, n=3, cutoff=0.7)]
    near = list(dict.fromkeys(near))[:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f"sections are {', '.join(SECTIONS)}"
    raise ConfigError(f"{source}: no setting {name!r}; {hint}")


def _flag_of(setting: Field) -> str:
    return setting.metadata.get("flag") or "python"


def _from_text(text: str) -> tuple[str, Any]:
    """One `--set a.b=c`. Text fields take the characters as they are, others are read as YAML."""
    name, equals, raw = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: expected section.name=value, as in --set generate.seed=7")
    setting = legal(name.strip(), "--set")
    kind = str(setting.type)
    if kind.startswith("str"):
        value: Any = None if kind.endswith("None") and raw in ("null", "none") else raw
    else:
        value = _yaml(raw, f"--set {text}")
    return name.strip(), _fitted(name.strip(), setting, value, "--set")


def _from_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML file by dotted name."""
    try:
        content = _yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot read it ({one_line(error)}); give a YAML file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections ({', '.join(SECTIONS)}), got {type(content).__name__}")
    values = {}
    for section, entries in content.items():
        if section not in SECTIONS:
            near = difflib.get_close_matches(str(section), SECTIONS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"sections are {', '.join(SECTIONS)}"
            raise ConfigError(f"{path}: no section {section!r}; {hint}")
        if not isinstance(entries, dict):
            raise ConfigError(f"{path}: section {section!r} must hold name: value pairs, got {entries!r}")
        for key, value in entries.items():
            name = f"{section}.{key}"
            values[name] = _fitted(name, legal(name, str(path)), value, str(path))
    return values


def _yaml(text: str, source: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML ({one_line(error, 160)})") from None


def _fitted(name: str, setting: Field, value: Any, source: str) -> Any:
    """A parsed value in the type of its field; numbers become float where the field is one."""
    kind = str(setting.type)
    if kind == "tuple[str, ...]":
        value = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
    if isinstance(value, str) and kind.startswith("float"):
        value = _number(value)
    if not of_type(value, kind):
        word = WORDS[kind.removesuffix(" | None")]
        hint = " (quote it)" if word == "text" and source != "--set" and value is not None else ""
        raise ConfigError(f"{source}: {name}={value!r}: it must be {word}{hint}")
    return float(value) if kind.startswith("float") and value is not None else value


def _number(text: str) -> float | str:
    """YAML reads 1e-4 as text (it wants 1.0e-4); a person means the number."""
    try:
        return float(text)
    except ValueError:
        return text

"""What can be known before any rank starts: that the files, the model and the numbers fit together.

Reads headers and packets of the videos and the model's configuration, never weights or pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.assets import SOURCES, demo_dir, find
from launch.config import ReduceConfig, RunConfig, VideoConfig
from launch.errors import ConfigError
from launch.experts import check_experts
from launch.links import links_of_file
from launch.models import DEMOS, TEXT_FAMILIES, channels_of, check
from launch.models.base import VisualPlan
from launch.models.files import language_config, read_json
from launch.sparse import check_anchor, text_config
from launch.video import FramePlan, join, plan_frames
from launch.watch import Windows
from token_reduction import Budget, Reducer, from_spec
from tokenring.choose import check_name

CLIP = "clip:"
DENSE = ("demo", "qwen2_5_vl", "qwen3_vl")
"""Families without experts."""


@dataclass(frozen=True)
class Preflight:
    """What a run will work on. Token counts are None where only the loaded model can tell."""

    frames: int
    tokens_before: int | None
    tokens_after: int | None


def preflight(config: RunConfig) -> Preflight:
    """Check a run without starting it.

    Raises:
        ValueError: one line that says what was given, what is allowed and how to mend it.
    """
    links_of_file(config)
    check_name(config.attention.schedule, config.engine.nproc, backward=False)
    family = check(config.model.source)
    check_experts(config, _language_config(config, family))
    check_anchor(config, text_config(config.model.source, family in DEMOS))
    method, budget = method_of(config.reduce)
    refuse_blind(method, channels_of(family), config.model.source)
    frames = planned_frames(config.video)
    if family not in (*DEMOS, *TEXT_FAMILIES):
        return Preflight(len(frames), None, None)
    from launch.encoder import GRID, SIDE

    plan = VisualPlan(frames=len(frames), frames_per_group=1, height=SIDE, width=SIDE, grid=(len(frames), GRID, GRID))
    after = sum(cut_windows(plan, config.reduce, method, budget).counts)
    if after < config.engine.nproc:
        _enough_rows(config, _folder(config, family), plan, after)
    return Preflight(len(frames), plan.tokens, after)


def method_of(config: ReduceConfig) -> tuple[Reducer, Budget]:
    """The reducer and the budget of a specification such as "divprune:0.1"."""
    try:
        return from_spec(config.spec)
    except ValueError as error:
        raise ConfigError(f"reduce.spec is {config.spec!r}: {error}") from error


def refuse_blind(method: Reducer, channels: frozenset[str], model: str) -> None:
    """Raise where a reducer looks at what a model does not give. The question's embeddings are always there: they share the
    space of x, not that of an encoder's patches."""
    given = channels | ({"text"} if method.text_space == "x" else set())
    missing = sorted(method.needs - given)
    if not missing:
        return
    raise ConfigError(
        f"reducer {method.name} needs {', '.join(missing)}, which model {model} does not give"
        + ("; its text has to share a space with the patches" if "text" in missing else "")
        + f"; it gives {', '.join(sorted(given)) or 'no channel'}: choose another reducer, or an option of this one that does without"
    )


def planned_frames(config: VideoConfig) -> FramePlan:
    """Probe the clips and choose the frames. A name such as "clip:bikes" is a clip of the demo's own packages."""
    clips = join([_packaged(path) if path.startswith(CLIP) else path for path in config.paths], config.loop)
    return plan_frames(clips, fps=config.fps, count=config.frames, start=config.start, stop=config.stop)


def _packaged(name: str) -> Path:
    clips = [source for source in SOURCES if source.startswith(CLIP)]
    if name not in clips:
        raise ConfigError(f"{name} is no clip of the demo; its clips are {', '.join(clips)}")
    return find(name)


def cut_windows(plan: VisualPlan, config: ReduceConfig, method: Reducer, budget: Budget) -> Windows:
    """The windows of a video with their budgets."""
    try:
        return Windows.cut(plan, config.window, method, budget)
    except ValueError as error:
        raise ConfigError(f"reduce.spec is {config.spec!r} with reduce.window {config.window}: {error}") from error


def _folder(config: RunConfig, family: str) -> Path:
    """The directory of the language model."""
    return demo_dir() / "smollm2" if family in DEMOS else Path(config.model.source)


def _language_config(config: RunConfig, family: str) -> Mapping[str, Any]:
    """What says how many experts the language model has; empty for those that never have any."""
    if family in DENSE:
        return {}
    folder = _folder(config, family)
    return read_json(folder / "config.json") if family in DEMOS else language_config(folder)


def _enough_rows(config: RunConfig, folder: Path, plan: VisualPlan, after: int) -> None:
    """Few visual tokens: count the text too, as the prompt has it."""
    from launch.models.demo import prompt_ids
    from launch.models.files import load_tokenizer

    text = len(prompt_ids(load_tokenizer(folder), config.generate.prompt, visual=0))
    if text + after < config.engine.nproc:
        raise ConfigError(
            f"engine.nproc is {config.engine.nproc}, more ranks than the {text + after} tokens of the sequence "
            f"({text} of text, {after} visual); give --nproc {text + after} or fewer"
        )

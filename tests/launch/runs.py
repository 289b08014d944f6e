"""Configurations of runs over one clip on CPUs, for tests."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from launch.config import (
    AnchorSection,
    AttentionConfig,
    EngineConfig,
    GenerateConfig,
    ModelConfig,
    MoEConfig,
    OutputConfig,
    ReduceConfig,
    RunConfig,
    VideoConfig,
)

SECTIONS = {
    "video": VideoConfig,
    "model": ModelConfig,
    "reduce": ReduceConfig,
    "attention": AttentionConfig,
    "anchor": AnchorSection,
    "moe": MoEConfig,
    "generate": GenerateConfig,
    "engine": EngineConfig,
    "output": OutputConfig,
}


def config_of(clip: Path, model: str, world: int, **changes: Any) -> RunConfig:
    """Verified, and changed where told: section__field=value."""
    told = {"video__paths": (str(clip),), "model__source": model, "engine__nproc": world, "engine__device": "cpu"}
    sections: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in (told | {"output__verify": True} | changes).items():
        section, _, field = name.partition("__")
        sections[section][field] = value
    return RunConfig(**{name: SECTIONS[name](**fields) for name, fields in sections.items()})

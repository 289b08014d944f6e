"""Sparse prefill of a run: which configuration, which rows are kept, what a layout should be, and what every layer did.

check_anchor      before any rank starts: settings that do not fit the model or each other
SparseRun         on each rank: the block around prefill, and its share of the report (`launch.sparse_report`)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.config import RunConfig
from launch.errors import ConfigError
from launch.models.base import VISUAL, Adapter, Prompt
from sparse_attn import AnchorConfig, StripePlan, TunedConfig
from sparse_attn.distributed import group_layout
from sparse_attn.stats import Stats
from tokenring.layout import Layout


def anchor_config(config: RunConfig) -> AnchorConfig | TunedConfig:
    """What `sparse_prefill` is given. Raises ConfigError for a file that cannot be used."""
    section = config.anchor
    if section.tuned is not None:
        try:
            return TunedConfig.load(section.tuned)
        except (OSError, ValueError) as error:
            raise ConfigError(f"anchor.tuned is {section.tuned!r}: {error}") from error
    sizes = {name: getattr(section, name) or "auto" for name in ("block", "step")}
    return AnchorConfig(
        theta=section.theta,
        identify=section.identify,
        share=section.share,
        dense=section.dense,
        last=section.last,
        **sizes,
    )


def check_anchor(config: RunConfig, text: Mapping[str, Any] | None) -> None:
    """Refuse settings of sparse prefill that cannot be honoured, from the `text_config` of a model's config.json.

    Raises:
        ConfigError: one line that says what was given, what is allowed and how to mend it.
    """
    if config.attention.kind != "anchor":
        if config.anchor.given:
            name = config.anchor.given[0]
            value = getattr(config.anchor, name)
            raise ConfigError(
                f"anchor.{name} is {value!r}, which belongs to --attention anchor; add it or leave this out"
            )
        return
    found, text = anchor_config(config), text or {}
    kinds = text.get("layer_types") or (["sliding_attention"] if text.get("use_sliding_window") else [])
    others = sorted(set(kinds) - {"full_attention"})
    if others:
        raise ConfigError(
            f"attention.kind is 'anchor', but model {config.model.source} has {others[0]} layers; sparse prefill is causal "
            "attention over all earlier rows: give --attention exact"
        )
    heads = text.get("num_attention_heads")
    layers = found.layers.values() if isinstance(found, TunedConfig) else ()
    wrong = {len(c.theta) for c in layers if isinstance(c.theta, tuple)} - {heads}
    if heads is not None and wrong:
        raise ConfigError(
            f"anchor.tuned is {config.anchor.tuned!r}, with thetas of {min(wrong)} heads; model {config.model.source} has {heads} "
            "query heads: tune for this model"
        )


def text_config(source: str, demo: bool) -> Mapping[str, Any]:
    """What a model's config.json says about its language model."""
    from launch.assets import demo_dir
    from launch.models.files import read_json

    whole = read_json((demo_dir() / "smollm2" if demo else Path(source)) / "config.json")
    return whole.get("text_config", whole)


class SparseRun:
    """Sparse prefill on one rank."""

    def __init__(self, config: RunConfig) -> None:
        self.section, self.layout_name = config.anchor, config.attention.layout
        self.found, self.verify = anchor_config(config), config.output.verify
        self.calls: dict[int, Stats] = {}
        self.keep: Tensor | None = None
        self.device = torch.device("cpu")

    def layout(self, length: int, world: int) -> Layout:
        """Whole groups on a rank, as far as that leaves ranks even: what they want then travels once."""
        if self.layout_name != "zigzag":
            return getattr(Layout, self.layout_name)(length, world)
        return group_layout(length, world, self.of(0))

    def of(self, layer: int) -> AnchorConfig:
        """What a layer was told."""
        return self.found.layer(layer) if isinstance(self.found, TunedConfig) else self.found

    @contextmanager
    def prefill(self, adapter: Adapter, short: Prompt) -> Iterator[None]:
        """Inside `sequence_parallel`: prompts are attended to sparsely."""
        from sparse_attn.integrations.huggingface import sparse_prefill

        self.keep, self.device = kept_rows(short, self.section.keep), adapter.embed(short.input_ids[:0]).device
        options = {"keep": self.keep, "keep_plans": self.verify, "density": self.section.density}
        with sparse_prefill(adapter.text_model, self.found, **options) as self.calls:
            yield

    @property
    def path(self) -> str:
        """ "anchor", or the schedule of dense attention where no layer ran sparse."""
        dense = {name for stats in self.calls.values() for name in schedules_of(stats) if stats.path == "dense"}
        return "anchor" if any(s.path == "sparse" for s in self.calls.values()) else ", ".join(sorted(dense)) or "dense"

    def record(self) -> dict[str, Any]:
        """This rank's share of the report; JSON safe."""
        given = {name: getattr(self.section, name) for name in self.section.given}
        layers = [_layer(number, stats) for number, stats in sorted(self.calls.items())]
        return {"identify": self._identify, "given": given, "layers": layers}

    @property
    def _identify(self) -> str:
        configs = self.found.layers.values() if isinstance(self.found, TunedConfig) else (self.found,)
        return ", ".join(sorted({c.identify for c in configs}))

    def plans(self) -> dict[int, StripePlan | None]:
        """This rank's columns of each layer, by position of the sequence; None where a layer was dense."""
        return {number: s.plan if s.path == "sparse" else None for number, s in sorted(self.calls.items())}


def kept_rows(short: Prompt, which: str) -> Tensor | None:
    """int64: the rows of the reduced prompt that every later row is to see."""
    if which == "none":
        return None
    visual = short.input_ids == VISUAL
    rows = (visual if which == "visual" else ~visual).nonzero().flatten()
    return rows.to(torch.int64)


def schedules_of(stats: Stats) -> list[str]:
    """Names of the plans whose transfers a layer ran."""
    return [plan.schedule for plan in getattr(stats, "plans", ())]


def _layer(number: int, stats: Stats) -> dict[str, Any]:
    return {
        "layer": number,
        "path": stats.path,
        "why": stats.why,
        "theta": stats.theta,
        "density": stats.density,
        "stripe_density": stats.stripe_density,
        "bytes_sent": stats.bytes_sent,
        "ring_bytes": getattr(stats, "ring_bytes", 0),
        "wanted": getattr(stats, "wanted", 0.0),
        "imbalance": stats.imbalance,
        "seconds": dict(stats.seconds),
    }

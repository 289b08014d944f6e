"""The video language models the launcher can run: `load("demo")`, `load("demo-moe")` or `load(directory)`.

`check(source)` says at once, without loading weights, whether a source can be used; the launcher asks before it starts workers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.models.files import FAMILIES, TEXT_FAMILIES
from launch.models.files import check as _check

if TYPE_CHECKING:
    from launch.models.base import Adapter
    from moe.integrations.huggingface_loading import OwnExperts

__all__ = ["DEMOS", "FAMILIES", "TEXT_FAMILIES", "channels_of", "check", "load"]

DEMOS = ("demo", "demo-moe")


def check(source: str | Path) -> str:
    """The family of a source (each of `DEMOS` is its own), found without loading weights.

    Raises:
        ValueError: the source cannot be used; one line says why and what is allowed.
    """
    family = str(source) if str(source) in DEMOS else _check(source)
    if family in DEMOS or family in TEXT_FAMILIES:
        from launch import assets

        for name in ("vit_onnx", "smollm2_gguf"):
            assets.find(name)
    return family


def channels_of(family: str) -> frozenset[str]:
    """What the adapter of a family gives to reducers, found without loading weights."""
    return _adapter(family).channels


def load(source: str | Path, dtype: Any = None, device: Any = "cpu", own: OwnExperts | None = None) -> Adapter:
    """The adapter of a model.

    Args:
        source: one of `DEMOS`, or a local Hugging Face directory of one of `FAMILIES`. Nothing is downloaded.
        dtype: torch dtype of the weights; torch.float32 where none is given.
        device: where the weights go.
        own: which experts of a directory's mixture this rank reads; None: all. For demos, whose experts are copies, nothing.

    Raises:
        ValueError: the source cannot be used; one line says why and what is allowed.
    """
    import torch

    family = check(source)
    dtype = torch.float32 if dtype is None else dtype
    adapter = _adapter(family)
    return adapter.load(dtype, device) if family in DEMOS else adapter.load(Path(source), dtype, device, own)


def _adapter(family: str) -> Any:
    """The class of a family."""
    if family in DEMOS:
        from launch.models.demo import DemoAdapter
        from launch.models.demo_moe import DemoMoeAdapter

        return DemoAdapter if family == "demo" else DemoMoeAdapter
    if family in TEXT_FAMILIES:
        from launch.models.text import TextAdapter

        return TextAdapter
    if family == "llava_onevision":
        from launch.models.llava import LlavaAdapter

        return LlavaAdapter
    from launch.models.qwen import Qwen3Adapter, Qwen3MoeAdapter, Qwen25Adapter

    return {"qwen2_5_vl": Qwen25Adapter, "qwen3_vl": Qwen3Adapter, "qwen3_vl_moe": Qwen3MoeAdapter}[family]

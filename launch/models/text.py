"""A language model that has never seen: its directory's weights behind the demo's encoder and random projector.

For mixture-of-experts models that come as text only (Qwen3-MoE, Mixtral): the way of a video through them is real, bytes of
experts and all; their words about the picture mean nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from launch.models.demo import DemoAdapter
from launch.models.files import load_model, load_tokenizer

if TYPE_CHECKING:
    from moe.integrations.huggingface_loading import OwnExperts


class TextAdapter(DemoAdapter):
    """See launch.models.base.Adapter for the methods."""

    def __init__(self, encoder: Any, model: Any, tokenizer: Any, name: str) -> None:
        super().__init__(encoder, model, tokenizer)
        self.name = name
        self.notes = (
            f"{name} is a model of text alone: the video comes to it through a fixed random map, not a trained one, so its words "
            "about the video mean nothing; its mechanics (tokens, positions, bytes, times) are real.",
        )

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, device: Any, own: OwnExperts | None = None) -> TextAdapter:
        """From a local directory; the encoder is the demo's and stays float32 whatever the dtype."""
        from transformers import AutoModelForCausalLM

        from launch import assets, encoder

        model = load_model(AutoModelForCausalLM, path, dtype, device, own)
        vit = encoder.load(Path(assets.demo_dir()) / "vit.safetensors", fit="squash", device=device)
        return cls(vit, model, load_tokenizer(path), path.name)

"""What the video language models of transformers share: a directory with a model, a tokenizer and a video processor's values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from launch.models.base import TextSide
from launch.models.files import load_model, load_tokenizer, video_settings

if TYPE_CHECKING:
    from moe.integrations.huggingface_loading import OwnExperts


class VideoModel(TextSide):
    """A model that sees with its own encoder. See launch.models.base.Adapter for the methods of families."""

    architecture = ""
    """The class of transformers that reads the directory."""
    channels: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def __init__(self, model: Any, tokenizer: Any, settings: dict[str, Any], name: str, *, position_axes: int) -> None:
        super().__init__(
            model.model.language_model,
            model.lm_head,
            tokenizer,
            model.generation_config.eos_token_id,
            position_axes=position_axes,
        )
        self.model, self.name, self.settings = model, name, settings

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype, device: Any, own: OwnExperts | None = None) -> Self:
        """From a local directory."""
        import transformers

        model = load_model(getattr(transformers, cls.architecture), path, dtype, device, own)
        return cls(model, load_tokenizer(path), video_settings(path), path.name)

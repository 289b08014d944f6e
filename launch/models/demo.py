"""The demo model: a real ViT-S/14, a real SmolLM2-135M, and between them a projector that nobody trained.

    features f (256, 384) of a frame  ->  n = (f - mean(f)) / std(f), row by row
                                      ->  x = m + s * (n W),   W (384, 576) ~ Normal(0, 1 / 384), seed 0

m and s (576,) are the mean and spread of each column of the language model's embedding table, so that visual rows look like
text rows to its first norm. No package holds a trained vision-language projector; the demo's words about a picture therefore
mean nothing, while everything else (decoding, encoding, reduction, positions, prefill, cache, decoding of tokens) is real.

Frames are squashed to the encoder's square, so that every token sees picture and none a black bar; a report's cells then lie
where the picture is. (The encoder's own package letterboxes: on a 16:9 video 7 of 16 rows of tokens would be bars.)

Reducers see x, the projected rows, as DivPrune defines it and as the trained families do; W keeps angles between features up
to a few hundredths. Channels: what the encoder gives, `launch.encoder.ViT.forward`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.models.base import VISUAL, Prompt, TextSide, VisualPlan, check_run
from launch.models.files import load_model, load_tokenizer
from token_reduction import VisualTokens

NOTE = (
    "The demo's projector is a fixed random map, not a trained one: its words about the video mean nothing, its mechanics "
    "(tokens, positions, bytes, times) are real."
)
_MARK = "\x00video\x00"


class DemoAdapter(TextSide):
    """See launch.models.base.Adapter for the methods."""

    name = "demo"
    channels = frozenset({"cls_attn", "cls_logits", "recv_attn", "keys", "queries", "patches", "pixels"})
    notes = (NOTE,)

    def __init__(self, encoder: Any, model: Any, tokenizer: Any) -> None:
        super().__init__(model.model, model.lm_head, tokenizer, model.generation_config.eos_token_id, position_axes=1)
        from launch.encoder import GRID, SIDE

        self.encoder, self.grid_side, self.image_side = encoder, GRID, SIDE
        width = encoder.position.shape[1]
        draw = torch.randn(width, self.hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        table = self.table.detach().float()
        self.map = draw.to(table.device) / width**0.5
        self.mean, self.spread = table.mean(dim=0), table.std(dim=0)

    @classmethod
    def load(cls, dtype: torch.dtype, device: Any) -> DemoAdapter:
        """From the installed packages, converted once by launch.assets. The encoder stays float32 whatever the dtype."""
        from transformers import AutoModelForCausalLM

        from launch import assets, encoder

        folder = Path(assets.demo_dir())
        model = load_model(AutoModelForCausalLM, folder / "smollm2", dtype, device)
        vit = encoder.load(folder / "vit.safetensors", fit="squash", device=device)
        return cls(vit, model, load_tokenizer(folder / "smollm2"))

    def visual_plan(self, frames: int, height: int, width: int) -> VisualPlan:
        """See Adapter. Every frame becomes 224 x 224 pixels and 16 x 16 tokens."""
        if frames < 1 or min(height, width) < 1:
            raise ValueError(f"a video of {frames} frames of {width}x{height} pixels has nothing to encode")
        side, grid = self.image_side, self.grid_side
        return VisualPlan(frames=frames, frames_per_group=1, height=side, width=side, grid=(frames, grid, grid))

    @torch.no_grad()
    def prepare(self, frames: Tensor, plan: VisualPlan, first: int = 0, channels: Collection[str] = ()) -> VisualTokens:
        """See Adapter."""
        check_run(plan, frames.shape[0], first, channels, self.channels)
        encoded = self.encoder(frames, channels)
        projected = [self.project(features) for features in encoded["x"]]
        x = torch.cat(projected) if projected else self.table.new_zeros(0, self.hidden_size)
        start = first * plan.tokens_per_group
        return VisualTokens(
            x,
            [0, x.shape[0]],
            ((frames.shape[0], *plan.grid[1:]),),
            torch.arange(start, start + x.shape[0])[None],
            channels={name: encoded[name].flatten(0, 1) for name in channels},
        )

    def project(self, features: Tensor) -> Tensor:
        """(n, 384) encoder features of one frame -> (n, 576) rows in the language model's dtype."""
        normed = torch.nn.functional.layer_norm(features.float(), features.shape[-1:])
        return (self.mean + self.spread * (normed @ self.map)).to(self.table.dtype)

    def prompt(self, text: str, plan: VisualPlan, seconds: Sequence[float]) -> Prompt:
        """See Adapter. The video stands at the start of the user's turn; times are not told to the model."""
        if len(seconds) != plan.frames:
            raise ValueError(
                f"seconds has {len(seconds)} entries for the video's {plan.frames} frames; give one a frame"
            )
        ids = torch.tensor(prompt_ids(self.tokenizer, text, plan.tokens), dtype=torch.int64)
        return Prompt(ids, torch.arange(ids.numel())[None], ids.numel())


def prompt_ids(tokenizer: Any, text: str, visual: int) -> list[int]:
    """Token ids of one user turn: `visual` slots (-1), then the text, up to where the answer starts."""
    turn = [{"role": "user", "content": f"{_MARK}\n{text}"}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, *after = rendered.split(_MARK)
    if len(after) != 1:
        raise ValueError("the prompt's text holds the marker of the video; leave NUL characters out of it")
    head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after[0]))
    return [*head, *[VISUAL] * visual, *tail]

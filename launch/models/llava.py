"""LLaVA-OneVision: every frame through the SigLIP tower and the projector, then pooled 2 x 2; one learned row ends the video.

The pooling (bilinear, h = w = ceil(side / 2)) stays within a frame, so frames can be encoded anywhere; the closing row,
`image_newline`, stands once after the last frame and is never reduced: it is part of the prompt, not of the visual tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from launch.models.base import NEWLINE, VISUAL, Prompt, VisualPlan, check_run
from launch.models.files import render_chat
from launch.models.pixels import Pixels
from launch.models.video import VideoModel
from token_reduction import VisualTokens

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class LlavaAdapter(VideoModel):
    """See launch.models.base.Adapter for the methods."""

    architecture = "LlavaOnevisionForConditionalGeneration"

    def __init__(self, model: Any, tokenizer: Any, settings: dict[str, Any], name: str) -> None:
        super().__init__(model, tokenizer, settings, name, position_axes=1)
        self.pixels = Pixels.of(settings, CLIP_MEAN, CLIP_STD)
        vision = model.config.vision_config
        self.image_size = vision.image_size
        self.side = -(-(vision.image_size // vision.patch_size) // 2)
        size = settings.get("size") or {"height": 384, "width": 384}
        if (size.get("height"), size.get("width")) != (vision.image_size, vision.image_size):
            raise ValueError(
                f"{name}: the processor file resizes to {size}, the vision tower takes {vision.image_size}x{vision.image_size}"
            )

    def visual_plan(self, frames: int, height: int, width: int) -> VisualPlan:
        """See Adapter. Frames are resized to a square, whatever their shape, as the family does."""
        if frames < 1 or min(height, width) < 1:
            raise ValueError(f"a video of {frames} frames of {width}x{height} pixels has nothing to encode")
        size, side = self.image_size, self.side
        return VisualPlan(frames=frames, frames_per_group=1, height=size, width=size, grid=(frames, side, side))

    @torch.no_grad()
    def prepare(self, frames: Tensor, plan: VisualPlan, first: int = 0, channels: Collection[str] = ()) -> VisualTokens:
        """See Adapter."""
        check_run(plan, frames.shape[0], first, channels, self.channels)
        encoded = [self._encode(frame, plan) for frame in frames]
        x = torch.cat(encoded) if encoded else self.table.new_zeros(0, self.hidden_size)
        start = first * plan.tokens_per_group
        places = torch.arange(start, start + x.shape[0])[None]
        return VisualTokens(x, [0, x.shape[0]], ((len(encoded), *plan.grid[1:]),), places)

    def _encode(self, frame: Tensor, plan: VisualPlan) -> Tensor:
        x = self.pixels(frame[None].to(self.table.device), plan.height, plan.width).to(self.table.dtype)
        rows = self.model.get_video_features(pixel_values_videos=x[None]).pooler_output[0]
        return rows[:-1]  # the last one is image_newline, which belongs to the whole video

    def prompt(self, text: str, plan: VisualPlan, seconds: Sequence[float]) -> Prompt:
        """See Adapter. The family does not tell the model any times."""
        if len(seconds) != plan.frames:
            raise ValueError(
                f"seconds has {len(seconds)} entries for the video's {plan.frames} frames; give one a frame"
            )
        rendered = render_chat(self.tokenizer, text)
        ids = torch.tensor(self.tokenizer(rendered, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        slots = (ids == self.model.config.video_token_id).nonzero().flatten().tolist()
        if len(slots) != 1:
            raise ValueError(
                f"the prompt has {len(slots)} video tokens and must have 1; leave the video token out of the text (or the "
                "chat template does not fit the model)"
            )
        video = torch.tensor([VISUAL] * plan.tokens + [NEWLINE])
        ids = torch.cat([ids[: slots[0]], video, ids[slots[0] + 1 :]])
        return Prompt(ids, torch.arange(ids.numel())[None], ids.numel())

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """See Adapter; NEWLINE gives the model's own `image_newline`."""
        ids = ids.to(self.table.device)
        closing = ids == NEWLINE
        rows = super().embed(torch.where(closing, 0, ids))
        rows[closing] = self.model.model.image_newline.to(rows.dtype)
        return rows

"""Qwen2.5-VL and Qwen3-VL: frames in groups of two, M-RoPE positions (time, height, width), DeepStack planes.

Qwen2.5-VL puts the whole video into one block and spaces its temporal positions by `tokens_per_second * seconds per group`;
Qwen3-VL writes "<1.5 seconds>" before the block of every group, which then has one temporal position of its own. In both,
text after a block starts max(h, w) above the block's start, and the first generated token at the largest position + 1.
Sources: the models' `get_rope_index` and video processors in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from launch.models.base import VISUAL, Prompt, VisualPlan, check_run
from launch.models.files import render_chat
from launch.models.pixels import Pixels, fit
from launch.models.video import VideoModel
from token_reduction import VisualTokens


class QwenAdapter(VideoModel):
    """What both families share. See launch.models.base.Adapter for the methods."""

    def __init__(self, model: Any, tokenizer: Any, settings: dict[str, Any], name: str) -> None:
        super().__init__(model, tokenizer, settings, name, position_axes=3)
        vision = model.config.vision_config
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size
        self.frames_per_group = vision.temporal_patch_size
        theirs = {
            "patch_size": self.patch,
            "merge_size": self.merge,
            "temporal_patch_size": self.frames_per_group,
        }
        for key, value in theirs.items():
            if settings.get(key, value) != value:
                raise ValueError(f"{name}: the processor file says {key}={settings[key]}, config.json says {value}")
        self.pixels = Pixels.of(settings, *self.colours)
        to_token = tokenizer.convert_ids_to_tokens
        self.video_token = to_token(model.config.video_token_id)
        self.marks = to_token(model.config.vision_start_token_id), to_token(model.config.vision_end_token_id)

    def visual_plan(self, frames: int, height: int, width: int) -> VisualPlan:
        """See Adapter."""
        if frames < 1 or min(height, width) < 1:
            raise ValueError(f"a video of {frames} frames of {width}x{height} pixels has nothing to encode")
        h, w = self.fitted(frames, height, width)
        cell = self.patch * self.merge
        grid = (-(-frames // self.frames_per_group), h // cell, w // cell)
        return VisualPlan(frames=frames, frames_per_group=self.frames_per_group, height=h, width=w, grid=grid)

    def fitted(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """The family's own rule for the size frames are resized to."""
        raise AssertionError("a family implements fitted")

    @torch.no_grad()
    def prepare(self, frames: Tensor, plan: VisualPlan, first: int = 0, channels: Collection[str] = ()) -> VisualTokens:
        """See Adapter. The tower's attention stays within a group, so groups are encoded one at a time."""
        check_run(plan, frames.shape[0], first, channels, self.channels)
        starts = range(0, frames.shape[0], self.frames_per_group)
        encoded = [self._encode(frames[i : i + self.frames_per_group], plan) for i in starts]
        count = len(encoded) * plan.tokens_per_group
        empty = self.table.new_zeros(0, 1 + self.planes, self.hidden_size)
        rows = torch.cat(encoded) if encoded else empty
        start = first // self.frames_per_group * plan.tokens_per_group
        return VisualTokens(
            rows[:, 0].contiguous(),
            [0, count],
            ((len(encoded), *plan.grid[1:]),),
            torch.arange(start, start + count)[None],
            channels={"planes": rows[:, 1:].contiguous()} if self.planes else {},
        )

    def _encode(self, frames: Tensor, plan: VisualPlan) -> Tensor:
        """One group of frames -> (h * w, 1 + planes, hidden)."""
        x = self.pixels(frames.to(self.table.device), plan.height, plan.width)
        x = torch.cat([x, x[-1:].expand(self.frames_per_group - x.shape[0], -1, -1, -1)])
        rows, columns = plan.height // self.patch, plan.width // self.patch
        cells = x.view(
            self.frames_per_group,
            3,
            rows // self.merge,
            self.merge,
            self.patch,
            columns // self.merge,
            self.merge,
            self.patch,
        )
        # (cell row, cell column, row in cell, column in cell, colour, frame, y, x): a cell's patches become one token
        patches = cells.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(rows * columns, -1)
        grid = torch.tensor([[1, rows, columns]], device=x.device)
        out = self.model.get_video_features(patches, grid)
        return torch.stack([out.pooler_output[0], *self._deepstack(out)], dim=1)

    def _deepstack(self, out: Any) -> list[Tensor]:
        return []

    def _prompt(self, rendered: str, blocks: int, plan: VisualPlan, interval: Tensor) -> Prompt:
        """Token ids of a rendered chat with each video token widened to a block's slots."""
        ids = torch.tensor(self.tokenizer(rendered, add_special_tokens=False)["input_ids"], dtype=torch.int64)
        video = ids == self.model.config.video_token_id
        if int(video.sum()) != blocks:
            raise ValueError(
                f"the prompt has {int(video.sum())} {self.video_token} tokens for {blocks} blocks of the video; leave that "
                "token out of the text (or the chat template does not fit the model)"
            )
        ids = torch.where(video, VISUAL, ids)
        ids = ids.repeat_interleave(torch.where(video, plan.tokens // blocks, 1))
        positions = mrope_positions(ids, plan.grid[1], plan.grid[2], interval)
        return Prompt(ids, positions, int(positions.max()) + 1)


class Qwen25Adapter(QwenAdapter):
    """Qwen2.5-VL."""

    architecture = "Qwen2_5_VLForConditionalGeneration"
    colours = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

    def fitted(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Pixels of one frame lie between size.shortest_edge and size.longest_edge (older files: min_pixels, max_pixels)."""
        cell = self.patch * self.merge
        low, high = limits(self.settings, 128 * 28 * 28, 768 * 28 * 28)
        low, high = self.settings.get("min_pixels") or low, self.settings.get("max_pixels") or high
        if self.settings.get("cap_pixels_per_frame"):
            whole = int((self.settings.get("max_video_tokens") or 128000) * cell * cell * 0.9)
            high = max(min(high, whole * self.frames_per_group // frames), int(low * 1.05))
        return fit(height, width, cell, low, high)

    def prompt(self, text: str, plan: VisualPlan, seconds: Sequence[float]) -> Prompt:
        """See Adapter. Temporal positions are even, as the family has them: from the mean distance of the frames."""
        check_seconds(plan, seconds)
        between = (seconds[-1] - seconds[0]) / (len(seconds) - 1) if len(seconds) > 1 else 0.0
        per_group = torch.tensor(between * self.frames_per_group, dtype=torch.float32)
        interval = self.model.config.vision_config.tokens_per_second * per_group
        return self._prompt(render_chat(self.tokenizer, text), 1, plan, interval)


class Qwen3Adapter(QwenAdapter):
    """Qwen3-VL."""

    architecture = "Qwen3VLForConditionalGeneration"
    colours = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    def __init__(self, model: Any, tokenizer: Any, settings: dict[str, Any], name: str) -> None:
        super().__init__(model, tokenizer, settings, name)
        self.planes = len(model.config.vision_config.deepstack_visual_indexes)

    def fitted(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Pixels of the whole video lie between size.shortest_edge and size.longest_edge."""
        if frames < self.frames_per_group:
            raise ValueError(
                f"{self.name} needs {self.frames_per_group} frames or more, got {frames}; choose more frames"
            )
        cell = self.patch * self.merge
        low, high = limits(self.settings, 128 * 32 * 32, 768 * 32 * 32)
        if self.settings.get("cap_pixels_per_frame"):
            cap = (self.settings.get("max_video_tokens") or 768) * cell * cell
            high = max(min(cap, high // frames), int(low * 1.05)) * frames
        if min(height, width) < cell:
            grow = max(cell / height, cell / width)
            height, width = int(height * grow), int(width * grow)
        return fit(height, width, cell, low, high, frames, self.frames_per_group)

    def prompt(self, text: str, plan: VisualPlan, seconds: Sequence[float]) -> Prompt:
        """See Adapter. A group's time is the mean of its first and its last frame's, written to a tenth of a second."""
        check_seconds(plan, seconds)
        start, end = self.marks
        times = list(seconds) + [seconds[-1]] * (plan.grid[0] * self.frames_per_group - len(seconds))
        groups = [times[i : i + self.frames_per_group] for i in range(0, len(times), self.frames_per_group)]
        blocks = "".join(f"<{(g[0] + g[-1]) / 2:.1f} seconds>{start}{self.video_token}{end}" for g in groups)
        rendered = render_chat(self.tokenizer, text)
        # The pair of marks that the chat template puts around the video goes: the model was trained with one pair a group.
        wrapped = f"{start}{self.video_token}{end}"
        rendered = rendered.replace(wrapped if wrapped in rendered else self.video_token, blocks, 1)
        return self._prompt(rendered, plan.grid[0], plan, torch.tensor(1.0))

    def _deepstack(self, out: Any) -> list[Tensor]:
        return [plane[0] for plane in out.deepstack_features]

    def _plane_arguments(self, embeds: Tensor, planes: Tensor | None, visual_rows: Tensor | None) -> dict[str, Any]:
        if planes is None or visual_rows is None:
            return {}
        visual = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        visual[:, visual_rows.to(embeds.device)] = True
        return {"visual_pos_masks": visual, "deepstack_visual_embeds": list(planes.unbind(1))}


class Qwen3MoeAdapter(Qwen3Adapter):
    """Qwen3-VL with experts in its language model; everything else is Qwen3-VL's."""

    architecture = "Qwen3VLMoeForConditionalGeneration"


def limits(settings: dict[str, Any], low: int, high: int) -> tuple[int, int]:
    """(fewest, most) pixels of a processor file."""
    size = settings.get("size") or {}
    return int(size.get("shortest_edge") or low), int(size.get("longest_edge") or high)


def check_seconds(plan: VisualPlan, seconds: Sequence[float]) -> None:
    """Refuse times that are not one a frame."""
    if len(seconds) != plan.frames:
        raise ValueError(f"seconds has {len(seconds)} entries for the video's {plan.frames} frames; give one a frame")


def mrope_positions(ids: Tensor, h: int, w: int, interval: Tensor) -> Tensor:
    """Positions (3, L) of a prompt: text counts up on all axes, a block of visual rows spans time, height and width.

    >>> ids = torch.tensor([5, 6, -1, -1, -1, -1, 7])
    >>> mrope_positions(ids, 2, 2, torch.tensor(1.0)).tolist()
    [[0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]]
    """
    visual = ids == VISUAL
    edges = (visual.diff().nonzero().flatten() + 1).tolist()
    pieces, at = [], 0
    for start, stop in zip([0, *edges], [*edges, ids.numel()]):
        count = stop - start
        if not visual[start]:
            pieces.append((at + torch.arange(count)).expand(3, -1))
            at += count
            continue
        t = (torch.arange(count // (h * w)) * interval).long()
        axes = torch.meshgrid(t, torch.arange(h), torch.arange(w), indexing="ij")
        pieces.append(at + torch.stack([axis.flatten() for axis in axes]))
        at += max(h, w)
    return torch.cat(pieces, dim=1)

"""Real features of real clips for `benchmarks/token_reduction.py`: the demo's ViT-S/14, every channel that a reducer may need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launch import assets, encoder
from launch.video import join, plan_frames, read
from token_reduction import VisualTokens

GRID, SIDE, PATCH = encoder.GRID, encoder.SIDE, encoder.PATCH
CLIPS = ("bigbuckbunny", "bikes", "carphone_pristine")


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip's frames (F, 224, 224, 3) uint8, its tokens with all channels, and queries: crops and the frame each is from."""

    name: str
    frames: Tensor
    tokens: VisualTokens
    queries: Tensor
    answers: Tensor


def vit() -> encoder.ViT:
    """The demo's encoder."""
    return encoder.load(Path(assets.demo_dir()) / "vit.safetensors", fit="squash")


def tokens_of(model: encoder.ViT, frames: Tensor, text: Tensor | None = None) -> VisualTokens:
    """All frames as one item. text: (m, 384) rows of an image that asks, in the space of x."""
    encoded = {name: value.flatten(0, 1) for name, value in model(frames, encoder.CHANNELS).items()}
    x = encoded.pop("x")
    channels = dict(encoded)
    channels["text"] = x[:8] if text is None else text
    count = len(x)
    return VisualTokens(x, [0, count], [(len(frames), GRID, GRID)], torch.arange(count)[None], channels)


def clip(model: encoder.ViT, name: str, frames: int, queries: int, seed: int = 0) -> Clip:
    """`frames` frames evenly over the clip, and `queries` jittered crops of them."""
    pictures = _read(name, frames)
    chance = torch.Generator().manual_seed(seed)
    answers = torch.randint(frames, (queries,), generator=chance)
    asked = [model(_crop(pictures[t], chance)[None], ())["x"] for t in answers]
    loud = model(_crop(pictures[frames // 2], chance)[None], ("cls_attn",))
    text = loud["x"][0][loud["cls_attn"][0, :, -1].topk(8).indices]
    return Clip(name, pictures, tokens_of(model, pictures, text), torch.cat(asked) if asked else answers, answers)


def read_every(name: str, stride: int, count: int) -> Tensor:
    """Frames 0, stride, 2 stride, ... of a clip, `count` of them."""
    plan = plan_frames(join([assets.find(f"clip:{name}")]))
    frames = [_resize(torch.from_numpy(np.ascontiguousarray(image)), SIDE)
              for number, (_, image) in zip(range(stride * count), read(plan, 0, len(plan))) if number % stride == 0]  # fmt: skip
    return torch.stack(frames[:count])


def _read(name: str, count: int) -> Tensor:
    plan = plan_frames(join([assets.find(f"clip:{name}")]), count=count)
    small = [_resize(torch.from_numpy(np.ascontiguousarray(image)), SIDE) for _, image in read(plan, 0, len(plan))]
    return torch.stack(small)


def _resize(picture: Tensor, side: int) -> Tensor:
    planes = picture.permute(2, 0, 1)[None].float()
    small = torch.nn.functional.interpolate(planes, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return small[0].permute(1, 2, 0).round().clamp(0, 255).byte()


def _crop(picture: Tensor, chance: torch.Generator) -> Tensor:
    """Half the area at a random place, brighter or darker, back to full size: what a person remembers of a frame."""
    side = round(SIDE * 0.7)
    top, left = torch.randint(SIDE - side, (2,), generator=chance).tolist()
    light = 0.85 + 0.3 * float(torch.rand((), generator=chance))
    part = (picture[top : top + side, left : left + side].float() * light).clamp(0, 255).byte()
    return _resize(part, SIDE)

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
LATE, MIDDLE = (8, 9, 10, 11), 6


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


@torch.no_grad()
def encode(model: encoder.ViT, frame: Tensor) -> dict[str, Tensor]:
    """One frame (224, 224, 3) uint8 -> every channel, one row per patch. The attention maps of one frame are small."""
    pixels = encoder.normalise(frame, "squash")
    patches = model.patch(pixels[None]).flatten(2).transpose(1, 2)
    rows = torch.cat([model.cls_token.expand(1, 1, -1), patches], 1) + model.position
    cls, received = [], []
    for number, block in enumerate(model.blocks):
        rows, q, k = block(rows)
        if number in LATE or number == MIDDLE:
            attention = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1)[0].mean(0)
            if number in LATE:
                cls.append(attention[0, 1:])
            if number in (MIDDLE, LATE[-1]):
                received.append(attention.mean(0)[1:])
    wide = [part.transpose(1, 2).flatten(2)[0, 1:] for part in (q, k)]
    cells = frame.float().view(GRID, PATCH, GRID, PATCH, 3).permute(0, 2, 1, 3, 4) / 255
    return {
        "x": model.norm(rows)[0, 1:],
        "cls_attn": torch.stack(cls, 1),
        "recv_attn": torch.stack(received, 1),
        "queries": wide[0],
        "keys": wide[1],
        "pixels": cells.reshape(GRID * GRID, PATCH * PATCH, 3),
    }


def tokens_of(model: encoder.ViT, frames: Tensor, text: Tensor | None = None) -> VisualTokens:
    """All frames as one item. text: (m, 384) rows of an image that asks, in the space of x."""
    parts = [encode(model, frame) for frame in frames]
    channels = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "x"}
    x = torch.cat([part["x"] for part in parts])
    channels["patches"] = x
    channels["text"] = x[:8] if text is None else text
    count = len(x)
    return VisualTokens(x, [0, count], [(len(frames), GRID, GRID)], torch.arange(count)[None], channels)


def clip(model: encoder.ViT, name: str, frames: int, queries: int, seed: int = 0) -> Clip:
    """`frames` frames evenly over the clip, and `queries` jittered crops of them."""
    pictures = _read(name, frames)
    chance = torch.Generator().manual_seed(seed)
    answers = torch.randint(frames, (queries,), generator=chance)
    asked = torch.stack([encode(model, _crop(pictures[t], chance))["x"] for t in answers])
    loud = encode(model, _crop(pictures[frames // 2], chance))
    text = loud["x"][loud["cls_attn"][:, -1].topk(8).indices]
    return Clip(name, pictures, tokens_of(model, pictures, text), asked, answers)


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

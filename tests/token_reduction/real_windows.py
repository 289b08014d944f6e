"""A small real task: which clip is this window of, and which way up is it?

    frames of three clips ── ViT-S/14 ──> maps 16 x 16 ── windows 8 x 8 at any place ── each turned four ways

Windows to learn from are of a clip's earlier frames, windows to be judged by of its later ones. The mean of a window's tokens is
the same whichever way it is turned, so whoever sees means only is right one time in four at most: what a compressor is for has
to be learned here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.token_reduction_data import CLIPS, read_every, vit

SIDE, C, TURNS = 8, 16, 4
CLASSES = len(CLIPS) * TURNS
FRAMES, EARLY = 7, 5
"""Of each clip, and how many of them are learned from."""
STRIDES = {"bigbuckbunny": 18, "bikes": 35, "carphone_pristine": 17}


@dataclass(frozen=True, eq=False)
class Windows:
    """All windows (F, 9, 9, C, 8, 8) of two depths of the encoder, and the clip (F,) of each frame."""

    last: Tensor
    keys: Tensor
    clip: Tensor

    def draw(self, count: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """`count` windows, each turned four ways: maps (4 count, 8, 8, C) of both depths, and classes (4 count,)."""
        which = tuple(torch.randint(size, (count,), generator=g) for size in self.last.shape[:3])
        maps = [
            torch.cat([torch.rot90(part[which], turn, (2, 3)) for turn in range(TURNS)])
            for part in (self.last, self.keys)
        ]
        label = TURNS * self.clip[which[0]].repeat(TURNS) + torch.arange(TURNS).repeat_interleave(count)
        return maps[0].permute(0, 2, 3, 1) + places(), maps[1].permute(0, 2, 3, 1) + places(), label


def places() -> Tensor:
    """(8, 8, C) sines that say where in a window a token is; whoever asks for tokens in any order needs them."""
    step = torch.arange(SIDE)[:, None] * torch.pi / SIDE * 2.0 ** torch.arange(C // 4) / 2
    line = torch.cat([step.sin(), step.cos()], 1)
    down, along = line[:, None].expand(-1, SIDE, -1), line[None].expand(SIDE, -1, -1)
    return torch.cat([down, along], 2)


def windows() -> tuple[Windows, Windows]:
    """Those to learn from, and those to be judged by."""
    model, made = vit(), []
    for name in CLIPS:
        made.append(model(read_every(name, STRIDES[name], FRAMES), ("keys",)))
    early = torch.arange(FRAMES) < EARLY
    sides = []
    planes = [few(torch.stack([part[name].flatten(2) for part in made]), early) for name in ("x", "keys")]
    clip = torch.arange(len(CLIPS))[:, None].expand(-1, FRAMES)
    for chosen in (early, ~early):
        cut = [p[:, chosen].flatten(0, 1).unfold(1, SIDE, 1).unfold(2, SIDE, 1) for p in planes]
        sides.append(Windows(cut[0], cut[1], clip[:, chosen].flatten()))
    return sides[0], sides[1]


def few(x: Tensor, early: Tensor) -> Tensor:
    """(clips, F, 256, D) -> (clips, F, 16, 16, C): the directions in which tokens to learn from differ most, of size 1 together."""
    known = x[:, early].reshape(-1, x.shape[-1])
    mean = known.mean(0)
    directions = torch.linalg.eigh((known - mean).T.double() @ (known - mean).double()).eigenvectors[:, -C:].float()
    directions = directions * directions.sum(0).sign()
    small = (x - mean) @ directions
    small = small / small[:, early].std()
    return small.unflatten(2, (16, 16))

"""Reductions for the eye: kept tokens over frames, scores as heat, and where the budget went.

Everything is numpy-free tensors in and uint8 tensors out; `save_png` and `save_animation` write files that any browser shows
(an animation is an animated PNG).
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from token_reduction.reduction import Reduction
from token_reduction.tokens import VisualTokens

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DIM, _LINE = 0.25, (255, 176, 0)


def kept_over_frames(frames: Tensor, tokens: VisualTokens, reduction: Reduction, item: int = 0) -> Tensor:
    """Frames (T, H, W, 3) uint8 of one item with removed cells dark; a cell that gathers several tokens has a bright edge.

    The token grid is stretched over the whole frame. Returns (T, H, W, 3) uint8.
    """
    t, h, w = _fits(frames, tokens, item)
    first, last = int(reduction.cu_seqlens[item]), int(reduction.cu_seqlens[item + 1])
    index = reduction.index[first:last].cpu() - int(tokens.cu_seqlens[item])
    light, gathers = torch.full((t * h * w,), _DIM), torch.zeros(t * h * w, dtype=torch.bool)
    light[index] = 1.0
    gathers[index] = reduction.sizes[first:last].cpu() > 1
    picture = frames.cpu().float() * _stretch(light.view(t, h, w), frames)[..., None]
    edge = _edges(frames, h, w) & _stretch(gathers.view(t, h, w), frames)
    picture[edge] = torch.tensor(_LINE, dtype=torch.float32)
    return picture.round().clamp(0, 255).byte()


def heat_over_frames(frames: Tensor, tokens: VisualTokens, scores: Tensor, item: int = 0) -> Tensor:
    """Frames with each token's score as heat, blue (lowest of the item) over green to red (highest). (T, H, W, 3) uint8.

    scores: (N,) of all tokens of the batch, as `Reduction.scores`; finite.
    """
    t, h, w = _fits(frames, tokens, item)
    first, last = int(tokens.cu_seqlens[item]), int(tokens.cu_seqlens[item + 1])
    own = scores[first:last].cpu().double()
    # Ranks, not values: attention spans decades, and one large score would leave everything else blue.
    rank = torch.searchsorted(own.sort().values, own).double() / max(1, own.numel() - 1)
    x = _stretch(rank.view(t, h, w), frames)
    colour = torch.stack([(2 * x - 1).clamp_min(0), 1 - (2 * x - 1).abs(), (1 - 2 * x).clamp_min(0)], -1)
    return (0.5 * frames.cpu().float() + 127.5 * colour).round().clamp(0, 255).byte()


def account(tokens: VisualTokens, reduction: Reduction) -> str:
    """Tokens kept of each frame, as a table of text; merged tokens are counted in the row that holds them.

    >>> from token_reduction import Budget, build
    >>> tokens = VisualTokens(torch.ones(8, 2), [0, 8], [(2, 2, 2)], torch.arange(8)[None])
    >>> print(account(tokens, build("evs").reduce(tokens, Budget.count(5))))
    item frame tokens kept gathered
       0     0      4    4        4
       0     1      4    1        1
       0   all      8    5        5
    """
    lines = ["item frame tokens kept gathered"]
    for item, (t, h, w) in enumerate(tokens.grid):
        first, last = int(reduction.cu_seqlens[item]), int(reduction.cu_seqlens[item + 1])
        frame = (reduction.index[first:last].cpu() - int(tokens.cu_seqlens[item])) // (h * w)
        kept = torch.bincount(frame, minlength=t).tolist()
        sizes = reduction.sizes[first:last].cpu()
        gathered = torch.zeros(t, dtype=torch.int64).index_add_(0, frame, sizes).tolist()
        lines += [f"{item:4} {f:5} {h * w:6} {k:4} {g:8}" for f, (k, g) in enumerate(zip(kept, gathered))]
        lines.append(f"{item:4} {'all':>5} {t * h * w:6} {sum(kept):4} {sum(gathered):8}")
    return "\n".join(lines)


def save_png(image: Tensor, path: str | Path) -> None:
    """One (H, W, 3) uint8 picture."""
    save_animation(image[None], path)


def save_animation(images: Tensor, path: str | Path, frames_per_second: float = 4.0) -> None:
    """Pictures (T, H, W, 3) uint8 as an animated PNG that runs for ever; one picture is a plain PNG."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"pictures are (T, H, W, 3) uint8, at least one, got {tuple(images.shape)} {images.dtype}")
    if not 0 < frames_per_second <= 1000:
        raise ValueError(f"frames_per_second is above 0 and at most 1000, got {frames_per_second!r}")
    count, height, width, _ = images.shape
    data = [_SIGNATURE, _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    if count > 1:
        data.append(_chunk(b"acTL", struct.pack(">II", count, 0)))
    number = 0
    for place, image in enumerate(images):
        lines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), image.cpu().reshape(height, -1)], 1)
        packed = zlib.compress(lines.numpy().tobytes(), 6)
        if count > 1:
            delay = round(1000 / frames_per_second)
            data.append(_chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, width, height, 0, 0, delay, 1000, 0, 0)))
            number += 1
        if place:
            packed, kind = struct.pack(">I", number) + packed, b"fdAT"
            number += 1
        else:
            kind = b"IDAT"
        data.append(_chunk(kind, packed))
    Path(path).write_bytes(b"".join([*data, _chunk(b"IEND", b"")]))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _fits(frames: Tensor, tokens: VisualTokens, item: int) -> tuple[int, int, int]:
    t, h, w = tokens.grid[item]
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[0] != t or frames.shape[3] != 3:
        raise ValueError(
            f"item {item} has {t} frames: give them as ({t}, H, W, 3) uint8, got {tuple(frames.shape)} {frames.dtype}; "
            "where one token spans two frames give every second one"
        )
    if frames.shape[1] < h or frames.shape[2] < w:
        raise ValueError(f"frames of {frames.shape[1]} x {frames.shape[2]} pixels cannot show {h} x {w} cells")
    return t, h, w


def _cells(length: int, cells: int) -> Tensor:
    return torch.arange(length) * cells // length


def _stretch(values: Tensor, frames: Tensor) -> Tensor:
    """(T, h, w) over the pixels, (T, H, W)."""
    _, height, width, _ = frames.shape
    return values[:, _cells(height, values.shape[1])][:, :, _cells(width, values.shape[2])]


def _edges(frames: Tensor, h: int, w: int) -> Tensor:
    """(1, H, W) bool: the pixels where a cell begins."""
    _, height, width, _ = frames.shape
    lines = torch.diff(_cells(height, h), prepend=torch.tensor([-1])) > 0
    columns = torch.diff(_cells(width, w), prepend=torch.tensor([-1])) > 0
    return (lines[:, None] | columns)[None]

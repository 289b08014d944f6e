"""From decoded frames to the numbers a vision tower takes: resize, scale, normalise, as the families' processors do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, which processor files use


@dataclass(frozen=True)
class Pixels:
    """y = (resize(x) - mean / scale) / (std / scale), x in 0..255, per colour."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    mode: str

    @classmethod
    def of(cls, settings: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]) -> Pixels:
        """From a processor file; `mean` and `std` are the family's own where the file is silent."""
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if settings.get(name) is False:
                raise ValueError(
                    f"the model's processor file says {name}=false, which is not supported; set it to true"
                )
        if settings.get("do_center_crop"):
            raise ValueError("the model's processor file says do_center_crop=true, which is not supported for video")
        resample = settings.get("resample") or 3
        if resample not in _RESAMPLE:
            raise ValueError(
                f"the model's processor file says resample={resample}; supported are 2 (bilinear), 3 (bicubic)"
            )
        return cls(
            tuple(settings.get("image_mean") or mean),
            tuple(settings.get("image_std") or std),
            float(settings.get("rescale_factor") or 1 / 255),
            _RESAMPLE[resample],
        )

    def __call__(self, frames: Tensor, height: int, width: int) -> Tensor:
        """uint8 (F, H, W, 3) -> float32 (F, 3, height, width).

        Resizing is antialiased and rounded to whole grey levels like torchvision's; there, CPUs with a fixed-point path may
        differ by one level.
        """
        x = frames.permute(0, 3, 1, 2).to(torch.float32)
        if x.shape[2:] != (height, width):
            x = interpolate(x, size=(height, width), mode=self.mode, antialias=True).round().clamp(0, 255)
        mean = torch.tensor(self.mean, device=x.device).view(3, 1, 1) * (1.0 / self.scale)
        std = torch.tensor(self.std, device=x.device).view(3, 1, 1) * (1.0 / self.scale)
        return (x - mean) / std


def fit(
    height: int, width: int, factor: int, low: float, high: float, frames: int = 1, group: int = 1
) -> tuple[int, int]:
    """Multiples of `factor` nearest to (height, width), grown or shrunk so that low <= pixels <= high.

    The rule of Qwen's `smart_resize`. Pixels are those of one frame, or with `frames` those of the whole video, counted in
    groups of `group` frames.

    >>> fit(720, 1280, 28, 128 * 28 * 28, 768 * 28 * 28)
    (560, 1008)
    """
    if max(height, width) / min(height, width) > 200:
        raise ValueError(f"frames are {width}x{height}; the longer side may be at most 200 times the shorter")
    h, w = round(height / factor) * factor, round(width / factor) * factor
    pixels = round(frames / group) * group * h * w
    if pixels > high:
        shrink = math.sqrt(frames * height * width / high)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif pixels < low:
        grow = math.sqrt(low / (frames * height * width))
        h, w = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return h, w

"""The demo's image encoder: a ViT-S/14 of DINOv2 layout, frames in, patch features out.

    224 x 224 pixels ── 14 x 14 patches ──> 16 x 16 = 256 rows + [CLS] ── 12 pre-norm blocks ──> norm ──> x (256, 384)

    x <- x + g1 * Attention(LN(x))        g1, g2: layer scale, one learned factor per channel
    x <- x + g2 * MLP(LN(x))              MLP: 384 -> 1536 -> exact GELU -> 384; LayerNorm eps 1e-6

Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", section 4 and appendix; layer scale
from Touvron et al., "Going deeper with Image Transformers", section 2. Weights come from `launch.convert`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 224
PATCH = 14
GRID = SIDE // PATCH
FITS = ("letterbox", "crop", "squash")
CHANNELS = ("cls_attn", "cls_logits", "recv_attn", "keys", "queries", "patches", "pixels")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Block(nn.Module):
    """One pre-norm transformer block with layer scale."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.scale2 = nn.Parameter(torch.ones(width))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of rows x (F, N, width), each (F, heads, N, head_dim)."""
        frames, rows, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(frames, rows, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows after the block, and the queries and keys it used."""
        q, k, v = self.project(x)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.scale1 * self.out(mixed)
        x = x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x, q, k


class ViT(nn.Module):
    """ViT-S/14 over 224 x 224 frames, inference only.

    Args:
        fit: how a frame of another shape becomes 224 x 224, see `fit_frame`.
        width, layers, heads: 384, 12, 6 for the demo's weights; smaller values serve tests.
    """

    def __init__(self, fit: str = "letterbox", width: int = 384, layers: int = 12, heads: int = 6):
        super().__init__()
        self.fit = _known_fit(fit)
        self.patch = nn.Conv2d(3, width, kernel_size=PATCH, stride=PATCH)
        self.cls_token = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.zeros(1 + GRID * GRID, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.eval().requires_grad_(False)

    def forward(self, frames: Tensor, channels: Collection[str] = ("cls_attn", "keys")) -> dict[str, Tensor]:
        """Encode frames, one by one: a frame's numbers do not depend on which frames came with it, to the last bit
        (for a fixed number of threads), so frames may be cut into runs and spread over ranks at will.

        Args:
            frames: uint8 (F, H, W, 3) in RGB order, any H and W; or float, already normalised, (F, 3, 224, 224).
            channels: of `CHANNELS`, what is wanted besides x. Only these are computed; `recv_attn` costs two attention maps.

        Returns:
            x (F, 256, 384): patch features after the last norm, rows in raster order, [CLS] left out.
            cls_attn (F, 256, 4): attention the [CLS] query pays to each patch in each block of the last third, mean over
                heads. The softmax includes [CLS] itself, so a column sums to a little less than 1.
            cls_logits (F, 256, 6): [CLS] query . key / sqrt(64) of the last block, before the softmax.
            recv_attn (F, 256, 2): attention that each patch receives in block 5 of 12 and in the last, mean over heads and
                queries, [CLS] among these.
            keys, queries (F, 256, 6, 64): of the last block.
            patches (F, 256, 384): x itself, for models that project x.
            pixels (F, 256, 196, 3): what each token saw, 0..1.

        Raises:
            ValueError: frames have another dtype or shape, or a channel is unknown.

        Example:
            >>> out = ViT(width=12, layers=3, heads=2)(torch.zeros(2, 90, 160, 3, dtype=torch.uint8))
            >>> {name: tuple(value.shape) for name, value in out.items()}
            {'x': (2, 256, 12), 'cls_attn': (2, 256, 1), 'keys': (2, 256, 2, 6)}
        """
        _check_frames(frames)
        unknown = sorted(set(channels) - set(CHANNELS))
        if unknown:
            raise ValueError(f"the encoder has no channel {unknown[0]!r}; it has {', '.join(CHANNELS)}")
        if not len(frames):
            nothing = self._encode(torch.zeros(SIDE, SIDE, 3, dtype=torch.uint8), channels)
            return {name: value[:0] for name, value in nothing.items()}
        # One frame already fills a CPU's matrix products: batches of 4, 8, 16 measured no faster, and hold more memory.
        parts = [self._encode(frame, channels) for frame in frames]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def _encode(self, frame: Tensor, channels: Collection[str]) -> dict[str, Tensor]:
        """One frame, (1, 256, ...) each."""
        pixels = normalise(frame.to(self.position.device), self.fit) if frame.dtype == torch.uint8 else frame
        patches = self.patch(pixels[None].to(self.position)).flatten(2).transpose(1, 2)
        rows = torch.cat([self.cls_token.expand(1, 1, -1), patches], dim=1) + self.position
        count, cls, received = len(self.blocks), [], []
        late, pair = 2 * count // 3, (9 * count // 24, count - 1)
        for number, block in enumerate(self.blocks):
            rows, q, k = block(rows)
            if number >= late and "cls_attn" in channels:
                # Only the [CLS] row of the map is wanted, so no (257, 257) map is ever formed.
                cls.append(_attention(q[:, :, :1], k)[:, :, 0, 1:].mean(1))
            if number in pair and "recv_attn" in channels:
                received.append(_attention(q, k).mean((1, 2))[:, 1:])
        out = {"x": self.norm(rows)[:, 1:]}
        made = {
            "cls_attn": lambda: torch.stack(cls, -1),
            "cls_logits": lambda: (q[:, :, :1] @ k.transpose(2, 3) / q.shape[-1] ** 0.5)[:, :, 0, 1:].transpose(1, 2),
            "recv_attn": lambda: torch.stack(received if pair[0] < pair[1] else 2 * received, -1),
            "keys": lambda: k.transpose(1, 2)[:, 1:],
            "queries": lambda: q.transpose(1, 2)[:, 1:],
            "patches": lambda: out["x"],
            "pixels": lambda: _cells(pixels),
        }
        return out | {name: make() for name, make in made.items() if name in channels}


def _attention(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)


def _cells(pixels: Tensor) -> Tensor:
    """Normalised pixels (3, 224, 224) -> (1, 256, 196, 3) in 0..1, patch by patch."""
    mean, std = (pixels.new_tensor(value)[:, None, None] for value in (MEAN, STD))
    cells = (pixels * std + mean).clamp(0, 1).view(3, GRID, PATCH, GRID, PATCH)
    return cells.permute(1, 3, 2, 4, 0).reshape(1, GRID * GRID, PATCH * PATCH, 3)


def load(path: str | Path, *, fit: str = "letterbox", device: str | torch.device = "cpu") -> ViT:
    """Read the encoder `launch.convert` wrote. On a CPU the weights stay mapped from the file, shared by all processes.

    Raises:
        ValueError: there is no such file, or it holds other tensors than this encoder's.

    Example: `encoder.load(assets.demo_dir() / "vit.safetensors")`
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ValueError(
            f"no encoder weights at {path}; allowed: a vit.safetensors file; run `make setup` to convert it"
        )
    with torch.device("meta"):
        model = ViT(fit)
    try:
        state = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}); allowed: what `python -m launch.assets` wrote; delete"
            " the file and run that"
        ) from None
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if wanted != found:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(
            f"{path} does not hold this encoder: {len(odd)} tensors differ, first {odd[0]}; allowed: what"
            " `python -m launch.assets` wrote; delete the file and run that"
        )
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def normalise(frame: Tensor, fit: str = "letterbox") -> Tensor:
    """One uint8 frame (H, W, 3) -> float32 (3, 224, 224), (value/255 - mean)/std with ImageNet's mean and std."""
    top, left, height, width = fit_frame(frame.shape[0], frame.shape[1], fit)
    pixels = frame.permute(2, 0, 1)[None].float() / 255
    pixels = F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True, align_corners=False)[0]
    if fit == "crop":
        pixels = pixels[:, -top : SIDE - top, -left : SIDE - left]
    elif fit == "letterbox":
        pixels = F.pad(pixels, (left, SIDE - width - left, top, SIDE - height - top))
    mean, std = pixels.new_tensor(MEAN), pixels.new_tensor(STD)
    return (pixels - mean[:, None, None]) / std[:, None, None]


def fit_frame(height: int, width: int, fit: str = "letterbox") -> tuple[int, int, int, int]:
    """Where an H x W frame lies on the encoder's 224 x 224 canvas: (top, left, height, width) in canvas pixels.

    letterbox: longest side 224, black bars, nothing lost; what the weights' own package does.
    crop: shortest side 224, the middle kept (top or left is then negative: what sticks out is lost).
    squash: both sides 224, shape not kept.
    A patch (i, j) of the 16 x 16 grid covers canvas pixels 14 i .. 14 i + 13, 14 j .. 14 j + 13: a plot of kept tokens
    over a frame maps these back with this box.

    Example:
        >>> fit_frame(720, 1280), fit_frame(720, 1280, "crop"), fit_frame(720, 1280, "squash")
        ((49, 0, 126, 224), (0, -87, 224, 398), (0, 0, 224, 224))
    """
    if _known_fit(fit) == "squash":
        return 0, 0, SIDE, SIDE
    scale = SIDE / (max if fit == "letterbox" else min)(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    return int((SIDE - new_height) / 2), int((SIDE - new_width) / 2), new_height, new_width


def _known_fit(fit: str) -> str:
    if fit not in FITS:
        raise ValueError(f"fit {fit!r} is unknown; allowed: {', '.join(FITS)}; choose one of them")
    return fit


def _check_frames(frames: Tensor) -> None:
    raw = frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[3] == 3 and min(frames.shape[1:3]) > 0
    ready = frames.is_floating_point() and tuple(frames.shape[1:]) == (3, SIDE, SIDE)
    if not (raw or ready):
        raise ValueError(
            f"frames are {frames.dtype} {tuple(frames.shape)}; allowed: uint8 (F, H, W, 3) or normalised float"
            f" (F, 3, {SIDE}, {SIDE}); permute or cast them first"
        )

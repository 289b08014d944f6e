"""What is measured of a reduction in `benchmarks/token_reduction.py`."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.token_reduction_data import GRID, PATCH, SIDE, Clip
from token_reduction import Reduction, VisualTokens

WORDS = (
    "harbour",
    "seven",
    "lantern",
    "copper",
    "window",
    "garden",
    "thunder",
    "violet",
    "market",
    "silver",
    "orbit",
    "maple",
)


def quality(clip: Clip, reduction: Reduction) -> dict[str, float]:
    """Coverage, diversity, attention mass, frame retrieval; all shares or cosines, of one clip."""
    x = clip.tokens.x
    kept = reduction.apply(x)
    unit, rows = (torch.nn.functional.normalize(part, dim=1) for part in (x, kept))
    mean = x.mean(0)
    flat, centred = (torch.nn.functional.normalize(part - mean, dim=1) for part in (x, kept))
    among = rows @ rows.T
    among.fill_diagonal_(-1)
    attention = clip.tokens.channels["cls_attn"][:, -1]
    return {
        "coverage": float((unit @ rows.T).amax(1).mean()),
        "coverage_centred": float((flat @ centred.T).amax(1).mean()),
        "nearest_kept": float(among.amax(1).mean()),
        "attention_mass": float(attention[reduction.index.unique()].sum() / attention.sum()),
        "retrieval": retrieval(clip, centred, reduction.index // GRID**2, mean),
        "frames_empty": clip.tokens.grid[0][0] - int((reduction.index // GRID**2).unique().numel()),
    }


def retrieval(clip: Clip, centred: Tensor, frame: Tensor, mean: Tensor) -> float:
    """Share of crops whose own frame, or one next to it, scores best: mean over the crop's tokens of the best cosine to the
    frame's kept rows. Neighbours of a few clips' frames differ by less than a crop does."""
    frames, right = clip.tokens.grid[0][0], 0
    for query, answer in zip(clip.queries, clip.answers):
        alike = torch.nn.functional.normalize(query - mean, dim=1) @ centred.T
        best = torch.full((frames, len(query)), -1.0)
        best.scatter_reduce_(0, frame[:, None].expand(-1, len(query)), alike.T.contiguous(), "amax")
        right += abs(int(best.mean(1).argmax()) - int(answer)) <= 1
    return right / len(clip.answers)


def seconds_of(
    call: Callable[[], Any], repeat: int = 3, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, Any]:
    """Median seconds of `repeat` calls by a clock, and the last result."""
    times, result = [], None
    for _ in range(repeat):
        start = clock()
        result = call()
        times.append(clock() - start)
    return statistics.median(times), result


def prefill_seconds(
    rows: int, layers: int = 30, width: int = 576, heads: int = 9, key_heads: int = 3, ffn: int = 1536
) -> float:
    """A causal decoder of SmolLM2-135M's size: one layer is timed and counted `layers` times (measured x modelled). CPU seconds."""
    x, dim = torch.randn(rows, width), width // heads
    shapes = ((width, width), (width, 2 * key_heads * dim), (width, 2 * ffn), (ffn, width))
    q, kv, up, down = (torch.randn(shape) for shape in shapes)

    def layer() -> Tensor:
        queries = (x @ q).view(1, rows, heads, dim).transpose(1, 2)
        k, v = (x @ kv).view(1, rows, 2, key_heads, dim).permute(2, 0, 3, 1, 4)
        k, v = (part.repeat_interleave(heads // key_heads, 1) for part in (k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(queries, k, v, is_causal=True)
        hidden = mixed.transpose(1, 2).reshape(rows, width) @ q
        a, b = (hidden @ up).chunk(2, -1)
        return (torch.nn.functional.silu(a) * b) @ down

    layer()
    return layers * seconds_of(layer, clock=time.process_time)[0]


def written(frames: Tensor, seed: int = 0) -> tuple[Tensor, list[list[str]], Tensor]:
    """Frames three times as large with four words on each; the words; which cells (F, 256) the words touch."""
    from PIL import Image, ImageDraw, ImageFont

    chance, large, words, cells = torch.Generator().manual_seed(seed), 3 * SIDE, [], []
    pictures = []
    for frame in frames:
        picture = Image.fromarray(frame.numpy()).resize((large, large))
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=44)
        own, touched = [], torch.zeros(GRID, GRID, dtype=torch.bool)
        for part in range(4):
            word = WORDS[int(torch.randint(len(WORDS), (), generator=chance))]
            x = int(torch.randint(large - 260, (), generator=chance))
            y = part * large // 4 + int(torch.randint(large // 4 - 70, (), generator=chance))
            box = draw.textbbox((x, y), word, font=font)
            draw.rectangle([box[0] - 6, box[1] - 6, box[2] + 6, box[3] + 6], fill="white")
            draw.text((x, y), word, font=font, fill="black")
            step = 3 * PATCH
            touched[box[1] // step : -(-box[3] // step), box[0] // step : -(-box[2] // step)] = True
            own.append(word)
        words.append(own)
        cells.append(touched.flatten())
        pictures.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(large, large, 3))
    return torch.stack(pictures), words, torch.stack(cells)


def text_survival(
    pictures: Tensor,
    words: Sequence[Sequence[str]],
    cells: Tensor,
    tokens: VisualTokens,
    reduction: Reduction,
    read: Any,
) -> dict[str, float | None]:
    """Share of written cells that stay, and of words that OCR still reads where only kept cells are shown (None: no OCR)."""
    kept = torch.zeros(tokens.x.shape[0], dtype=torch.bool)
    kept[reduction.index] = True
    kept = kept.view(len(pictures), GRID * GRID)
    share = float((kept & cells).sum() / cells.sum())
    if read is None:
        return {"text_cells": share, "words_read": None}
    found = total = 0
    for picture, own, stays in zip(pictures, words, kept):
        mask = stays.view(GRID, GRID).repeat_interleave(3 * PATCH, 0).repeat_interleave(3 * PATCH, 1)
        shown = torch.where(mask[..., None], picture, picture.float().mean((0, 1)).byte())
        seen = read(shown.numpy())
        found += sum(word in seen for word in own)
        total += len(own)
    return {"text_cells": share, "words_read": found / total}


def ocr() -> Any:
    """A function from a picture to the lower-case text on it, or None where rapidocr is not installed."""
    try:
        from rapidocr import RapidOCR
    except ImportError:
        return None
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)
    engine = RapidOCR()

    def read(picture: Any) -> str:
        return " ".join(engine(picture).txts or ()).lower()

    return read

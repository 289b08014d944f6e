"""A small decoder in float64, and the same decoder run whole with masks: the oracle of everything inside the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from token_reduction.inside import SYSTEM, TEXT, VISUAL, Probe, Prompt

WIDTH, HEADS, KEY_HEADS, DIM, FFN = 16, 4, 2, 4, 24


class TinyBlock(nn.Module):
    """Norm-free decoder layer with rotary positions; the feed-forward can be used in part."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)

        def matrix(a: int, b: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(a, b, generator=g, dtype=torch.float64) / a**0.5)

        self.q, self.k, self.v = (
            matrix(WIDTH, HEADS * DIM),
            matrix(WIDTH, KEY_HEADS * DIM),
            matrix(WIDTH, KEY_HEADS * DIM),
        )
        self.o, self.up, self.down = matrix(HEADS * DIM, WIDTH), matrix(WIDTH, FFN), matrix(FFN, WIDTH)

    def project(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle = positions[torch.arange(DIM // 2) % len(positions)].T.double() * 0.3 ** torch.arange(DIM // 2)

        def turn(x: Tensor) -> Tensor:
            a, b = x.split(DIM // 2, -1)
            c, s = angle.cos()[:, None], angle.sin()[:, None]
            return torch.cat([a * c - b * s, a * s + b * c], -1)

        q, k, v = (torch.tanh(hidden) @ w for w in (self.q, self.k, self.v))
        return turn(q.view(-1, HEADS, DIM)), turn(k.view(-1, KEY_HEADS, DIM)), v.view(-1, KEY_HEADS, DIM)

    def finish(self, hidden: Tensor, mixed: Tensor, share: Tensor) -> Tensor:
        hidden = hidden + mixed.flatten(1) @ self.o
        used = torch.arange(FFN) < torch.round(share * FFN)[:, None]
        return hidden + (torch.relu(torch.tanh(hidden) @ self.up) * used) @ self.down


def decoder(layers: int = 6) -> list[TinyBlock]:
    return [TinyBlock(seed) for seed in range(layers)]


def prompt(frames: int = 3, h: int = 2, w: int = 4, seed: int = 0, text: int = 5, planes: bool = False) -> Prompt:
    """Three system rows, frames, question rows; M-RoPE positions; two examples, the second the query."""
    g = torch.Generator().manual_seed(seed)
    n = frames * h * w
    kinds = torch.tensor([SYSTEM] * 3 + [VISUAL] * n + [TEXT] * text)
    rows = len(kinds)
    places = torch.arange(n)
    axes = torch.stack([places // (h * w), places % (h * w) // w, places % w])
    positions = torch.arange(rows).repeat(3, 1)
    positions[:, 3 : 3 + n] = 3 + axes
    positions[:, 3 + n :] = torch.arange(text) + 3 + int(axes.max()) + 1
    fill = lambda value: torch.cat([torch.full((3,), -1), value, torch.full((text,), -1)])  # noqa: E731
    samples = torch.ones(rows, dtype=torch.int64)
    samples[: 3 + h * w] = 0
    return Prompt(
        torch.randn(rows, WIDTH, generator=g, dtype=torch.float64),
        positions,
        kinds,
        frames=fill(axes[0]),
        cells=torch.stack([fill(axes[1]), fill(axes[2])], 1),
        samples=samples,
        importance=torch.rand(rows, generator=g, dtype=torch.float64),
        planes=torch.randn(n, 3, WIDTH, generator=g, dtype=torch.float64) if planes else None,
    )


def full_map(block: TinyBlock, hidden: Tensor, positions: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(H, S, S) attention, keys and values per head, with the textbook formula."""
    q, k, v = block.project(hidden, positions)
    k, v = k.repeat_interleave(HEADS // KEY_HEADS, 1), v.repeat_interleave(HEADS // KEY_HEADS, 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) / DIM**0.5
    return torch.softmax(logits.masked_fill(~allowed, -1e30), -1), k, v


def masked_run(blocks, hidden, positions, alive, replaced, steps, planes=None):
    """All rows through all layers; at layer l only keys of `alive[l]` are seen (and a row sees itself).

    alive: for each layer the prompt's rows that entered it. replaced: layer -> (rows, matrix): hidden rows that merges wrote
    after that layer. steps: (m, D) new rows behind the prompt, decoded at the next positions; they stay alive everywhere.
    planes: (S, layers, D), added after the first layers and merged as their rows are.
    """
    new = torch.arange(len(steps)).repeat(len(positions), 1) + int(positions.max()) + 1
    hidden, positions = torch.cat([hidden, steps]), torch.cat([positions, new], 1)
    rows = torch.arange(len(hidden))
    prompt_rows = len(hidden) - len(steps)
    for layer, block in enumerate(blocks):
        seen = torch.zeros(len(hidden), dtype=torch.bool)
        seen[alive[layer]] = True
        seen[prompt_rows:] = True
        allowed = (rows[:, None] >= rows) & (seen | torch.eye(len(rows), dtype=torch.bool))
        a, _, v = full_map(block, hidden, positions, allowed)
        hidden = block.finish(hidden, torch.einsum("hqk,khd->qhd", a, v), torch.ones(len(hidden)))
        if planes is not None and layer < planes.shape[1]:
            hidden[:prompt_rows] += planes[:, layer]
        if layer in replaced:
            kept, matrix, entered = replaced[layer]
            hidden[kept] = matrix @ hidden[entered]
            if planes is not None:
                planes[kept] = torch.einsum("mv,vld->mld", matrix, planes[entered])
    return hidden


def everything(seed: int = 0):
    """One layer's maps by the textbook, and its probe."""
    block, p = decoder(1)[0], prompt(seed=seed)
    rows = torch.arange(len(p.kinds))
    a, _, v = full_map(block, p.hidden, p.positions, rows[:, None] >= rows)
    q, k, _ = block.project(p.hidden, p.positions)
    logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) / DIM**0.5
    lse = logits.masked_fill(rows[:, None] < rows, -torch.inf).logsumexp(-1)
    return p, a, v, Probe(q, k, lse, rows, rows), logits


def best(score, rows, count):
    return sorted(sorted(rows, key=lambda r: (-float(score.detach()[r]), r))[:count])

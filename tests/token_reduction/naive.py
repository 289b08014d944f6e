"""Every method again, as loops over plain numbers in float64: slow, short, and written apart from the package.

Each function takes one frame or item and returns the kept tokens ascending, or a dense W with its kept tokens.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def cos(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def best(values, count):
    """Indices of the largest values, the lowest first among equals."""
    return [i for i, _ in sorted(enumerate(values), key=lambda pair: (-float(pair[1]), pair[0]))][:count]


def table(x: Tensor, y: Tensor) -> list[list[float]]:
    return [[cos(a, b) for b in y] for a in x]


def max_sum(x, count, pivot):
    kept = [pivot]
    while len(kept) < count:
        kept.append(min((sum(cos(x[v], x[c]) for c in kept), v) for v in range(len(x)) if v not in kept)[1])
    return sorted(kept)


def max_min(x, count, pivot):
    kept = [pivot]
    while len(kept) < count:
        free = [v for v in range(len(x)) if v not in kept]
        kept.append(max(free, key=lambda v: min(1 - cos(x[v], x[c]) for c in kept)))
    return sorted(kept)


def coverage(c, count, bonus, start):
    """Greedy over F(Y) = sum_i max(start, max_{y in Y} c[i][y]) + sum bonus, recomputed from nothing each time."""

    def value(chosen):
        return sum(max([start] + [row[y] for y in chosen]) for row in c) + sum(bonus[y] for y in chosen)

    kept: list[int] = []
    while len(kept) < count:
        kept.append(max((j for j in range(len(c[0])) if j not in kept), key=lambda j: value([*kept, j])))
    return sorted(kept)


def mmtok(x, seen, text, count, alpha, t_vision, t_text):
    p = torch.softmax(torch.tensor(table(text, x)) / t_text, 1) / len(text)
    q = torch.softmax(torch.tensor(table(seen, seen)) / t_vision, 1) / len(x)
    return coverage([*p.tolist(), *(alpha * q).tolist()], count, [0.0] * len(x), 0.0)


def catp(x, text, count, weight):
    mean = text.double().mean(0)
    s = [[(v + 1) / 2 for v in row] for row in table(x, x)]
    return coverage(s, count, [weight * (cos(a, mean) + 1) / 2 for a in x], 0.0)


def dpp(kernel: Tensor, count: int) -> list[int]:
    kept: list[int] = []
    while len(kept) < count:
        free = [j for j in range(len(kernel)) if j not in kept]
        kept.append(max(free, key=lambda j: float(torch.linalg.det(kernel[[*kept, j]][:, [*kept, j]]))))
    return kept


def cdpruner(x, patches, text, count):
    value = torch.tensor([-sum(cos(v, z) for z in text) / len(text) for v in patches], dtype=torch.float64)
    r = (value - value.min() + 1e-6) / (value.max() - value.min() + 1e-6)
    return sorted(dpp(torch.tensor(table(x, x)).double() * r[:, None] * r, count))


def hiprune(middle, deep, h, w, count, alpha, wrap):
    anchors = best(middle, round(count * alpha / 5))
    near = set()
    for token in anchors:
        for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            y, x = token // w + dy, token % w + dx
            if wrap:
                near.add(min(max(token + dy * w + dx, 0), h * w - 1))
            elif 0 <= y < h and 0 <= x < w:
                near.add(y * w + x)
    near -= set(anchors)
    taken = set(anchors) | set(sorted(near, key=lambda j: (-float(middle[j]), j))[: count - len(anchors)])
    left = [-math.inf if j in taken else float(deep[j]) for j in range(h * w)]
    return sorted(taken | set(best(left, count - len(taken))))


def dart(x, count, pivots):
    first = best(x.double().abs().sum(1), min(pivots, count))
    kept, left = list(first), count - len(first)
    for number, pivot in enumerate(first):
        share = (number + 1) * left // len(first) - number * left // len(first)
        free = [j for j in range(len(x)) if j not in kept]
        kept += sorted(free, key=lambda j: (cos(x[j], x[pivot]), j))[:share]
    return sorted(kept)


def vispruner(x, attention, count, important, per_round):
    first = best(attention, round(important * count))
    left = [j for j in range(len(x)) if j not in first]
    goal = count - len(first)
    while goal and len(left) > goal:
        a, b = left[::2], left[1::2]
        score = [max(cos(x[i], x[j]) for j in b) for i in a]
        gone = {a[i] for i in best(score, min(per_round, len(left) - goal, len(left) // 2))}
        left = [j for j in left if j not in gone]
    return sorted([*first, *left[:goal]])


def dycoke(x, t, cells, count):
    def change(frame, cell):
        if frame == 0:
            return 2.0
        before = frame - {0: 4, 1: 1, 2: 2, 3: 1}[frame % 4]
        return 1 - cos(x[frame * cells + cell], x[before * cells + cell])

    first, others = [f for f in range(t) if f % 4 == 0], [f for f in range(t) if f % 4]
    whole = min(count, len(first) * cells)
    kept = []
    for frames, total in ((first, whole), (others, count - whole)):
        for number, f in enumerate(frames):
            share = (number + 1) * total // len(frames) - number * total // len(frames)
            kept += [f * cells + c for c in best([change(f, c) for c in range(cells)], share)]
    return sorted(kept)


def vidcom2_scores(x, t, cells):
    x = x.double()
    order = best([-float(v) for v in x.var(0, unbiased=False)], max(1, x.shape[1] // 2))
    x = torch.nn.functional.normalize(x[:, sorted(order)], dim=1)
    centre = x.mean(0)
    video, both = [], []
    for f in range(t):
        part = x[f * cells : (f + 1) * cells]
        for row in part:

            def like(c, row=row):
                return sum(math.exp(-float(((row - c) ** 2).sum()) / (2 * a)) for a in (0.125, 0.25, 0.5, 1.0, 2.0))

            video.append(like(centre))
            both.append(like(centre) + like(part.mean(0)))
    return video, both


def still_segments(quiet, t, longest):
    """The best total saving over every way of cutting t frames; quiet[f][c]: cell c stands still from f to f + 1."""

    def saved(first, last):
        cells = len(quiet[0]) if quiet else 0
        return sum(all(quiet[f][c] for f in range(first, last - 1)) for c in range(cells)) * (last - first - 1)

    result = 0
    for mask in range(2 ** (t - 1)):
        edges = [0, *(f for f in range(1, t) if mask >> (f - 1) & 1), t]
        if all(b - a <= longest for a, b in itertools.pairwise(edges)):
            result = max(result, sum(saved(a, b) for a, b in itertools.pairwise(edges) if b - a > 1))
    return result

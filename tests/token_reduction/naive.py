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


def mmtok(x, text, count, alpha, t_vision, t_text):
    p = torch.softmax(torch.tensor(table(text, x)) / t_text, 1) / len(text)
    q = torch.softmax(torch.tensor(table(x, x)) / t_vision, 1) / len(x)
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


def visionzip(attention, keys, count, share, released):
    merged = min(count - 1, max(1, round(share * count)))
    dominant = best(attention, count - merged)
    others = [j for j in range(len(keys)) if j not in dominant]
    targets = others[:: len(others) // merged][:merged]
    rows = {i: {i: 1.0} for i in dominant}
    members = {t: [] for t in targets}
    for j in others:
        if j not in targets:
            members[max(targets, key=lambda t, j=j: cos(keys[j], keys[t]))].append(j)
    for t, group in members.items():
        if released:
            rows[t] = {t: 1.0} | {j: 1.0 / len(group) for j in group}
        else:
            rows[t] = {j: 1.0 / (len(group) + 1) for j in [t, *group]}
    return dense(rows, len(keys))


def dense(rows: dict[int, dict[int, float]], n: int) -> tuple[list[int], Tensor]:
    kept = sorted(rows)
    matrix = torch.zeros(len(kept), n, dtype=torch.float64)
    for place, anchor in enumerate(kept):
        for source, weight in rows[anchor].items():
            matrix[place, source] += weight
    return kept, matrix


def prumerge(attention, keys, chosen, neighbours, divide, extra=True):
    a = [float(v) for v in attention]
    rows = {}
    for i in chosen:
        near = best(
            [-math.inf if j == i else cos(keys[i], keys[j]) for j in range(len(a))], min(neighbours, len(a) - 1)
        )
        rows[i] = {i: 1.0} | {j: a[j] for j in near}
    others = [j for j in range(len(a)) if j not in chosen]
    if extra:
        rows[max(others, key=lambda j: a[j])] = {j: a[j] for j in others}
    kept, matrix = dense(rows, len(a))
    return kept, matrix / matrix.sum(1, keepdim=True) if divide else matrix


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


def transforming(x, attention, count, temperature, sources):
    kept = sorted(best(attention, count))
    rows = {}
    for i in kept:
        cosine = [2.0 if j == i else cos(x[i], x[j]) for j in range(len(x))]
        near = best(cosine, min(sources, len(x)))
        total = sum(math.exp(temperature * min(1.0, cosine[j])) for j in near)
        rows[i] = {j: math.exp(temperature * min(1.0, cosine[j])) / total for j in near}
    return dense(rows, len(x))


def bipartite(metric, count, per_round, sized, best_first):
    """Rows as (anchor, {token: weight}, size, metric)."""
    rows = [(i, {i: 1.0}, 1, m.double()) for i, m in enumerate(metric)]
    while len(rows) > count:
        a, b = rows[::2], rows[1::2]
        partner = [max(range(len(b)), key=lambda j, r=r: cos(r[3], b[j][3])) for r in a]
        score = [cos(r[3], b[p][3]) for r, p in zip(a, partner, strict=True)]
        order = best(score, len(a))
        gone = order[: min(len(rows) - count, len(rows) // 2, per_round or len(rows))]
        joined = []
        for j, target in enumerate(b):
            parts = [target, *(a[i] for i in sorted(gone) if partner[i] == j)]
            mass = [p[2] if sized else 1 for p in parts]
            share = [m / sum(mass) for m in mass]
            tokens = {t: v * s for p, s in zip(parts, share, strict=True) for t, v in p[1].items()}
            mean = sum(p[3] * s for p, s in zip(parts, share, strict=True))
            joined.append((target[0], tokens, sum(p[2] for p in parts), mean))
        if best_first:
            rows = [a[i] for i in order if i not in gone] + joined
        else:
            stay = {2 * i: a[i] for i in range(len(a)) if i not in gone} | {2 * j + 1: r for j, r in enumerate(joined)}
            rows = [stay[place] for place in sorted(stay)]
    return dense({anchor: tokens for anchor, tokens, _, _ in rows}, len(metric))


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


def peaks(x, neighbours, longest=None):
    longest = longest or float(x.double().norm(dim=1).max())
    d = torch.cdist(x.double()[None], x.double()[None])[0] / longest
    density = [math.exp(-sum(sorted(v**2 for v in row.tolist())[:neighbours]) / min(neighbours, len(x))) for row in d]
    scores = []
    for i in range(len(x)):
        denser = [j for j in range(len(x)) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        scores.append(density[i] * (min(float(d[i, j]) for j in denser) if denser else float(d[i].max())))
    return scores


def gather_nearest(x, centres, tokens):
    rows = {c: [c] for c in centres}
    for j in tokens:
        if j not in rows:
            rows[min(centres, key=lambda c, j=j: float((x[j].double() - x[c].double()).norm()))].append(j)
    return {c: {j: 1.0 / len(group) for j in group} for c, group in rows.items()}


def setok(x, count, neighbours):
    centres = sorted(best(peaks(x, neighbours), count))
    return dense(gather_nearest(x, centres, range(len(x))), len(x))


def vmtc(x, attention, count, primary, neighbours):
    first = best(attention, min(count - 1, round(primary * count)))
    others = [j for j in range(len(x)) if j not in first]
    centres = [others[i] for i in sorted(best(peaks(x[others], neighbours), count - len(first)))]
    return dense({i: {i: 1.0} for i in first} | gather_nearest(x, centres, others), len(x))


def medoids(d, count, first):
    """k-medoids over a distance table: farthest-point start, assign, move, until still."""
    centres = [first]
    while len(centres) < count:
        free = [j for j in range(len(d)) if j not in centres]
        centres.append(max(free, key=lambda j: min(d[j][c] for c in centres)))
    while True:
        groups = {c: [j for j in range(len(d)) if min(centres, key=lambda e, j=j: d[j][e]) == c] for c in centres}
        fresh = [min(g, key=lambda j: (sum(d[j][i] for i in g), j)) for g in groups.values()]
        if fresh == centres:
            return {c: sorted(g) for c, g in groups.items()}
        centres = fresh


def centerclip(x, t, cells, frames, count, first_of):
    kept = []
    cuts = [(f, min(f + frames, t)) for f in range(0, t, frames)]
    for number, (a, b) in enumerate(cuts):
        share = (number + 1) * count // len(cuts) - number * count // len(cuts)
        part = x[a * cells : b * cells].double()
        d = torch.cdist(part[None], part[None])[0].tolist()
        kept += [a * cells + c for c in medoids(d, share, first_of(part))]
    return sorted(kept)


def vflowopt(q, k, h, w, heads, t, m, count):
    n, d = len(q), q.shape[1] // heads
    q, k = q.double(), k.double()
    cuts = [slice(i * d, (i + 1) * d) for i in range(heads)]
    maps = [torch.softmax(q[:, c] @ k[:, c].T / d**0.5, 1) for c in cuts]
    attention = sum(maps) / heads
    received = attention.mean(0)
    global_ = [j for j in range(n) if received[j] > t * received.mean()] or list(range(n))
    score = attention[global_].mean(0)
    cell = [(j // w // m, j % w // m) for j in range(n)]
    kept = best(score, max(0, count - len(set(cell))))
    while True:
        others = [j for j in range(n) if j not in kept]
        spare = count - len(kept) - len({cell[j] for j in others})
        if spare <= 0:
            break
        kept += [others[i] for i in best([score[j] for j in others], spare)]
    if spare < 0:
        return dense({j: {j: 1.0} for j in best(score, count)}, n)
    rows = {j: {j: 1.0} for j in kept}
    for c in {cell[j] for j in others}:
        group = [j for j in others if cell[j] == c]
        mass = sum(float(score[j]) for j in group)
        rows[max(group, key=lambda j: float(score[j]))] = {j: float(score[j]) / mass for j in group}
    return dense(rows, n)


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

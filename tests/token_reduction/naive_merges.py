"""The merging and clustering methods again, as loops over plain numbers in float64; see `naive`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.token_reduction.naive import best, cos


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
        fresh = [
            min(g, key=lambda j: (round(sum(d[j][i] for i in g), 9), j)) for g in groups.values()
        ]  # ties are common
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

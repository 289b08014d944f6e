"""Methods that look along time, against loops; and GlobalCom2, whose frames are crops."""

from __future__ import annotations

import math

import pytest
import torch

from tests.token_reduction import naive, naive_merges
from tests.token_reduction.cases import one
from token_reduction import Budget, build
from token_reduction.reducers.holitom import HoliTom

H, W, CELLS = 2, 3, 6


def video(t: int, seed: int = 0, width: int = 8):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, CELLS, width, generator=g) + 0.4 * torch.randn(t, CELLS, width, generator=g).cumsum(0)
    x = x.reshape(-1, width)
    attention = torch.rand(t * CELLS, generator=g)
    pixels = torch.rand(t * CELLS, 2, 2, 3, generator=g)
    return x, attention, pixels, one(x, (t, H, W), cls_attn=attention, pixels=pixels)


def kept(name, tokens, count, **options):
    return build(name, **options).reduce(tokens, Budget.count(count)).index.tolist()


@pytest.mark.parametrize(("t", "count"), [(9, 20), (9, 40), (5, 7), (4, 3), (1, 4)])
def test_dycoke_keeps_what_changed_in_runs_of_four(t, count):
    x, _, _, tokens = video(t, seed=count)
    assert kept("dycoke", tokens, count) == naive.dycoke(x, t, CELLS, count)


@pytest.mark.parametrize(("t", "count"), [(6, 10), (3, 15), (8, 5)])
def test_difffp_keeps_the_largest_pixel_changes(t, count):
    _, _, pixels, tokens = video(t, seed=count)
    p = pixels.double().reshape(t, CELLS, -1)
    change = [255.0] * CELLS + [255 * float((p[f, c] - p[f - 1, c]).abs().mean()) for f in range(1, t) for c in range(CELLS)]  # fmt: skip
    assert kept("difffp", tokens, count) == sorted(naive.best(change, count))


def test_difffp_as_published_drops_still_patches_and_leaves_no_frame_empty():
    pixels = torch.zeros(4 * CELLS, 3)
    pixels[CELLS + 2 :: CELLS] = 0.5  # cell 2 lights up in frame 1 and stays
    pixels[3 * CELLS + 4] = 0.001  # 255 x 0.001 is above the threshold of 0.1
    tokens = one(torch.randn(4 * CELLS, 3), (4, H, W), pixels=pixels)
    frame0, lit, still, faint = list(range(CELLS)), CELLS + 2, 2 * CELLS, 3 * CELLS + 4
    assert kept("difffp", tokens, 24, variant="paper") == [*frame0, lit, still, faint]
    assert kept("difffp", tokens, 4, variant="released") == [0, lit, still, faint]


@pytest.mark.parametrize(("t", "count"), [(5, 11), (3, 14), (6, 8)])
def test_vidcom2_shares_by_frame_and_keeps_the_unlike(t, count):
    x, _, _, tokens = video(t, seed=count)
    video_score, both = naive.vidcom2_scores(x, t, CELLS)
    frame = torch.tensor(video_score, dtype=torch.float64).view(t, CELLS).mean(1)
    p = torch.softmax(-frame / 0.01, 0)
    index = kept("vidcom2", tokens, count)
    weight = 1 + p - p.mean()
    for f in range(t):
        own = [i - f * CELLS for i in index if i // CELLS == f]
        share = float(count * weight[f] / weight.sum())
        assert (
            abs(len(own) - min(share, CELLS)) < 1 + max(0.0, share - CELLS) or float(weight.max()) * count / t > CELLS
        )
        assert own == sorted(naive.best([-v for v in both[f * CELLS : (f + 1) * CELLS]], len(own)))
    assert len(index) == count


def test_vidcom2_leaves_no_frame_empty_while_there_are_tokens_for_all():
    for seed in range(3):
        x, _, _, tokens = video(6, seed=seed)
        x[CELLS : 2 * CELLS] += 5  # one frame far from all others asks for two shares
        frames = {i // CELLS for i in kept("vidcom2", tokens, 6)}
        assert frames == set(range(6))


def test_vidcom2_gives_more_to_the_frame_that_stands_out():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 8, generator=g).repeat(5, 1, 1) + 0.01 * torch.randn(5, 16, 8, generator=g)
    x[3] = -x[0]
    index = torch.tensor(kept("vidcom2", one(x.reshape(-1, 8), (5, 4, 4)), 20))
    sizes = torch.bincount(index // 16, minlength=5)
    assert int(sizes.argmax()) == 3 and int(sizes[3]) > int(sizes[0]) >= 1


@pytest.mark.parametrize(("t", "longest"), [(7, 32), (8, 3), (2, 32), (1, 4)])
def test_holitom_cuts_where_most_still_tokens_fall_away(t, longest):
    quiet = torch.rand(max(0, t - 1), CELLS, generator=torch.Generator().manual_seed(t)) > 0.4
    (cuts,) = HoliTom(longest=longest).cuts(quiet[None], t)
    assert [f for a, b in cuts for f in range(a, b)] == list(range(t))
    assert all(b - a <= longest for a, b in cuts)
    saved = sum(int(quiet[a : b - 1].all(0).sum()) * (b - a - 1) for a, b in cuts if b - a > 1)
    assert saved == naive.still_segments(quiet.tolist(), t, longest)


def test_holitom_joins_still_cells_over_time():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, CELLS, 6, generator=g)
    x[:, 1] = x[0, 1] + 0.01 * torch.randn(4, 6, generator=g)  # cell 1 stands still for four frames
    tokens = one(x.reshape(-1, 6), (4, H, W), cls_attn=torch.rand(4 * CELLS, generator=g))
    reduction = build("holitom", tau=0.9, merged=0.0).reduce(tokens, Budget.count(4 * CELLS - 3))
    assert reduction.index.tolist() == [j for j in range(4 * CELLS) if j not in (7, 13, 19)]
    assert reduction.sizes[1] == 4
    torch.testing.assert_close(reduction.apply(tokens.x)[1], x[:, 1].mean(0))
    # one more than is left: the still token that moved most stays apart
    more = build("holitom", tau=0.9, merged=0.0).reduce(tokens, Budget.count(4 * CELLS - 2))
    steps = torch.nn.functional.cosine_similarity(x[1:, 1].double(), x[:-1, 1].double())
    apart = int((1 - steps).argmax()) + 1
    assert more.index.tolist() == sorted({*range(4 * CELLS)} - {7, 13, 19} | {apart * CELLS + 1})


def test_holitom_rows_are_means_of_disjoint_tokens():
    _x, _, _, tokens = video(7, seed=1)
    reduction = build("holitom").reduce(tokens, Budget.count(12))
    dense = reduction.dense()
    assert bool(((dense > 0).sum(0) <= 1).all())
    torch.testing.assert_close(dense.sum(1), torch.ones(12, dtype=torch.float64))


def test_fastvid_cuts_at_the_deepest_changes_and_below_tau():
    g = torch.Generator().manual_seed(0)
    scenes = torch.randn(3, 8, generator=g)
    x = torch.stack([scenes[f // 3] for f in range(9)])[:, None] + 0.02 * torch.randn(9, CELLS, 8, generator=g)
    scenes, frames = [(0, 3), (3, 6), (6, 9)], [(f, f + 1) for f in range(9)]
    assert build("fastvid", segments=1).cuts(x[None]) == [scenes]
    assert build("fastvid", segments=3, tau=-1.0).cuts(x[None]) == [scenes]
    assert build("fastvid", segments=9, tau=-1.0).cuts(torch.stack([x, x.flip(0)])) == [frames, frames]


def test_fastvid_keeps_the_attended_and_merges_the_rest_around_their_centres():
    x, attention, _, tokens = video(4, seed=3)
    method = build("fastvid", segments=1, tau=-1.0, stride=2, merged=0.5)
    reduction = method.reduce(tokens, Budget.count(8))
    dense, index = reduction.dense(), reduction.index.tolist()
    salient = [f * CELLS + int(attention[f * CELLS : (f + 1) * CELLS].argmax()) for f in range(4)]
    alone = [i for row, i in zip(dense, index, strict=True) if float(row[i]) == 1.0 and int((row > 0).sum()) == 1]
    centres = [i for i in index if i not in salient]
    assert set(salient) <= set(alone) and len(centres) == 4
    assert all(c // CELLS in (0, 2) for c in centres)  # every second frame
    others = [j for j in range(24) if j not in salient]
    anchors = [j for j in others if j // CELLS in (0, 2)]
    score = naive_merges.peaks(x[anchors], 4, float(x.double().norm(dim=1).max()))
    assert centres == sorted(anchors[i] for i in naive.best(score, 4))
    for j in others:
        if j not in centres:
            nearest = min(centres, key=lambda c, j=j: float((x[j].double() - x[c].double()).norm()))
            assert float(dense[index.index(nearest), j]) > 0
    for c in centres:
        row = dense[index.index(c)]
        joined = int((row > 0).sum()) - 1
        assert float(row[c]) == pytest.approx(0.6 if joined else 1.0)
        assert joined == 0 or float(row.sum()) == pytest.approx(1.0)


def crops(seed=0, lines=2, columns=3, h=4, w=4):
    g = torch.Generator().manual_seed(seed)
    score = torch.rand(1 + lines * columns, h * w, generator=g) ** 2
    n = score.numel()
    heads = score.flatten()[:, None] + torch.randn(n, 1, generator=g) * torch.tensor(
        [[1.0, -2.0, 1.0]]
    )  # their mean is the score
    channels = {"cls_attn": score.flatten(), "cls_logits": heads}
    return score, one(torch.randn(n, 3), (1 + lines * columns, h, w), **channels)


def by_hand(score, lines, columns, h, w, ratio):
    """Crop shares and token scores, pixel by pixel (bilinear with half-pixel centres)."""
    thumb = score[0].view(h, w).double()

    def at(y, x):
        y, x = min(max(y, 0.0), h - 1), min(max(x, 0.0), w - 1)
        a, b = int(y), int(x)
        c, d = min(a + 1, h - 1), min(b + 1, w - 1)
        fy, fx = y - a, x - b
        top = thumb[a, b] * (1 - fx) + thumb[a, d] * fx
        return float(top * (1 - fy) + (thumb[c, b] * (1 - fx) + thumb[c, d] * fx) * fy)

    wide = [
        [at((i + 0.5) / lines - 0.5, (j + 0.5) / columns - 0.5) for j in range(columns * w)] for i in range(lines * h)
    ]
    length = math.sqrt(sum(v * v for row in wide for v in row))
    both, sums = [], []
    for crop in range(lines * columns):
        r, c = divmod(crop, columns)
        part = [wide[r * h + i][c * w + j] for i in range(h) for j in range(w)]
        own = score[1 + crop].double()
        both.append([float(o / own.norm()) + p / length for o, p in zip(own, part, strict=True)])
        sums.append(sum(part))
    sigma = torch.softmax((torch.tensor(sums, dtype=torch.float64) - max(sums)) / 10.0, 0)
    return both, (ratio * (1 + sigma - sigma.mean())).clamp(max=1).tolist()


def test_globalcom2_scores_and_shares():
    lines, columns, h, w = 2, 3, 4, 4
    score, tokens = crops()
    ratio = 0.25
    both, scale = by_hand(score, lines, columns, h, w, ratio)
    index = kept("globalcom2", tokens, 28, variant="released")
    expected = sorted(naive.best(score[0], 4))
    for crop, values in enumerate(both):
        expected += [(1 + crop) * 16 + j for j in sorted(naive.best(values, int(16 * scale[crop])))]
    assert index == expected
    exact = kept("globalcom2", tokens, 28)
    assert len(exact) == 28 and exact[:4] == expected[:4]
    for crop, values in enumerate(both):
        own = [j - (1 + crop) * 16 for j in exact if j // 16 == 1 + crop]
        assert own == sorted(naive.best(values, len(own))) and len(own) >= int(16 * scale[crop])


def test_globalcom2_takes_padding_last_and_needs_the_grid_to_fit():
    _, tokens = crops(lines=2, columns=2)
    wide = kept("globalcom2", tokens, 30, image=(50.0, 100.0))  # 8 x 8 mosaic: 2 lines of padding above and below
    rows = {((j // 16 - 1) // 2) * 4 + j % 16 // 4 for j in wide if j >= 16}
    assert rows == {2, 3, 4, 5}
    assert len(kept("globalcom2", tokens, 60, image=(50.0, 100.0))) == 60
    with pytest.raises(ValueError, match=r"crops=\(2, 3\) but the item has 4 frames after its thumbnail"):
        kept("globalcom2", tokens, 30, crops=(2, 3))

"""Pictures, accounts and published arithmetic."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch

from tests.token_reduction.cases import batch
from token_reduction import Budget, build
from token_reduction.flops import by_layer, divprune_share, prefill
from token_reduction.inside import VisionDropStages, aim, vtw
from token_reduction.show import account, heat_over_frames, kept_over_frames, save_animation, save_png


def pictures(path):
    """Read a PNG or animated PNG of our own kind back: (T, H, W, 3), with every checksum looked at."""
    data, at, frames, size = path.read_bytes(), 8, [], None
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    order = []
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        at += 12 + length
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
        if kind in (b"fcTL", b"fdAT"):
            order.append(struct.unpack(">I", body[:4])[0])
        if kind in (b"IDAT", b"fdAT"):
            raw = torch.frombuffer(bytearray(zlib.decompress(body[4:] if kind == b"fdAT" else body)), dtype=torch.uint8)
            lines = raw.view(size[1], 1 + 3 * size[0])
            assert bool((lines[:, 0] == 0).all())
            frames.append(lines[:, 1:].reshape(size[1], size[0], 3))
    assert order == list(range(len(order)))
    return torch.stack(frames)


def test_kept_cells_stay_bright_removed_ones_dark_and_merged_ones_have_an_edge(tmp_path):
    tokens = batch(((2, 3, 4), (3, 2, 2)))
    frames = torch.randint(40, 255, (2, 30, 41, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reduction = build("divprune").reduce(tokens, Budget.count(6))
    picture = kept_over_frames(frames, tokens, reduction)
    kept = set(reduction.index[:6].tolist())
    for row in range(24):
        frame, line, column = row // 12, row % 12 // 4, row % 4
        y, x = 10 * line + 5, round((column + 0.5) * 41 / 4)
        expected = frames[frame, y, x].float() * (1.0 if row in kept else 0.25)
        assert torch.equal(picture[frame, y, x], expected.round().byte())
    merged = kept_over_frames(frames, tokens, build("visionzip").reduce(tokens, Budget.count(6)))
    assert bool((merged == torch.tensor([255, 176, 0], dtype=torch.uint8)).all(-1).any())
    assert not bool((picture == torch.tensor([255, 176, 0], dtype=torch.uint8)).all(-1).any())
    save_animation(merged, tmp_path / "kept.png", frames_per_second=8)
    assert torch.equal(pictures(tmp_path / "kept.png"), merged)
    save_png(merged[1], tmp_path / "one.png")
    assert torch.equal(pictures(tmp_path / "one.png"), merged[1:])


def test_heat_runs_from_blue_to_red_by_rank_and_shows_the_second_item_too():
    tokens = batch(((1, 1, 2), (2, 1, 3)))
    frames = torch.zeros(2, 4, 6, 3, dtype=torch.uint8)
    scores = torch.tensor([9.0, 9.0, 1.0, 2.0, 4.0, 8.0, 1000.0, 16.0])
    heat = heat_over_frames(frames, tokens, scores, item=1)
    colours = [tuple(heat[f, 0, 2 * c].tolist()) for f in (0, 1) for c in (0, 1, 2)]
    assert colours[0] == (0, 0, 128) and colours[4] == (128, 0, 0)
    reds = [c[0] for c in colours]
    assert reds == sorted(reds[:4]) + [128, reds[5]] and reds[5] < 128


def test_the_account_of_every_frame_adds_up():
    tokens = batch()
    for name in ("divprune", "evs", "tome", "pool"):
        reduction = build(name).reduce(tokens, Budget.ratio(0.4))
        rows = [line.split() for line in account(tokens, reduction).splitlines()[1:]]
        frames, totals = [r for r in rows if r[1] != "all"], [r for r in rows if r[1] == "all"]
        assert [int(r[3]) for r in totals] == reduction.cu_seqlens.diff().tolist()
        assert sum(int(r[4]) for r in frames) == int(reduction.sizes.sum())
        assert len(frames) == sum(t for t, _, _ in tokens.grid)


def test_pictures_of_another_shape_are_refused():
    tokens = batch(((2, 3, 4),))
    reduction = build("uniform").reduce(tokens, Budget.count(6))
    with pytest.raises(ValueError, match="give them as"):
        kept_over_frames(torch.zeros(3, 30, 40, 3, dtype=torch.uint8), tokens, reduction)
    with pytest.raises(ValueError, match="cannot show 3 x 4 cells"):
        kept_over_frames(torch.zeros(2, 2, 40, 3, dtype=torch.uint8), tokens, reduction)
    with pytest.raises(ValueError, match="uint8, at least one"):
        save_animation(torch.zeros(0, 3, 3, 3, dtype=torch.uint8), "nowhere.png")


@pytest.mark.parametrize(
    ("visual", "ratio", "layers", "width", "ffn", "published"),
    [
        (576, 0.098, 32, 4096, 11008, 15.63),  # LLaVA-1.5-7B
        (576, 0.098, 40, 5120, 13824, 15.71),  # 13B
    ],
)
def test_divprunes_published_shares_of_flops(visual, ratio, layers, width, ffn, published):
    assert round(100 * divprune_share(visual, ratio, layers=layers, width=width, ffn=ffn), 2) == published


def test_other_published_arithmetic():
    # DivPrune, mean over its tasks on the 7B model: 3.2280 TFLOPs to 0.5122
    from token_reduction.flops import DIVPRUNE_TEXTS

    size = {"layers": 32, "width": 4096, "ffn": 11008}
    full = [prefill(text + 576, **size) / 1e12 for text in DIVPRUNE_TEXTS]
    few = [prefill(text + 56, **size) / 1e12 for text in DIVPRUNE_TEXTS]
    assert round(sum(full) / 11, 4) == 3.2280 and round(sum(few) / 11, 4) == 0.5122
    assert aim(28).mean_share(28) == pytest.approx(0.625)
    stages = [42 + 6, *(a + b for a, b in VisionDropStages().stages.values())]
    assert sum(stages) / 4 == 32  # eight layers with each
    assert by_layer([10] * 15 + [4] * 17, width=8, ffn=16) < prefill(10, layers=32, width=8, ffn=16)
    assert vtw(16).mean_share(32) == 0.5

"""What the oracle tests share: one item with every channel, and the two ways to compare a method with `naive`."""

from __future__ import annotations

import pytest
import torch

from tests.token_reduction.cases import one
from token_reduction import Budget, build

H, W = 4, 6
N = H * W


def data(frames: int = 1, seed: int = 0, width: int = 9):
    g = torch.Generator().manual_seed(seed)
    n = frames * N
    x = torch.randn(n, width, generator=g)
    channels = {
        "cls_attn": torch.rand(n, generator=g) ** 3,
        "keys": torch.randn(n, 8, generator=g),
        "queries": torch.randn(n, 8, generator=g),
        "recv_attn": torch.rand(n, 2, generator=g),
        "patches": torch.randn(n, width, generator=g),
        "text": torch.randn(5, width, generator=g),
    }
    return x, channels, one(x, (frames, H, W), **channels)


def kept(name, tokens, count, **options):
    return build(name, **options).reduce(tokens, Budget.count(count)).index.tolist()


def same_rows(name, tokens, count, expected, **options):
    anchors, matrix = expected
    reduction = build(name, **options).reduce(tokens, Budget.count(count))
    assert reduction.index.tolist() == anchors
    torch.testing.assert_close(reduction.dense(), matrix, atol=1e-6, rtol=1e-6)


SEEDS = pytest.mark.parametrize(("seed", "count"), [(0, 7), (1, 12), (2, 3), (3, 20)])

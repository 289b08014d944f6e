"""Reduction: W, planes and positions."""

from __future__ import annotations

import pytest
import torch

from tests.token_reduction.cases import METHODS, batch
from token_reduction import Budget, build


@pytest.mark.parametrize("name", METHODS)
def test_apply_equals_the_dense_matrix(name):
    tokens = batch()
    reduction = build(name).reduce(tokens, Budget.ratio(0.4))
    dense = reduction.dense()
    assert dense.shape == (reduction.index.numel(), tokens.x.shape[0])
    torch.testing.assert_close(dense.sum(1), torch.ones(dense.shape[0], dtype=torch.float64))
    assert bool((dense[torch.arange(len(dense)), reduction.index] > 0).all())  # a row draws on its own anchor
    torch.testing.assert_close(reduction.apply(tokens.x).double(), dense @ tokens.x.double(), atol=1e-5, rtol=1e-5)
    assert reduction.sizes.tolist() == (dense > 0).sum(1).tolist()


@pytest.mark.parametrize("name", METHODS)
def test_positions_and_labels_take_the_anchor_and_are_never_renumbered(name):
    tokens = batch()
    reduction = build(name).reduce(tokens, Budget.ratio(0.4))
    index = reduction.index
    torch.testing.assert_close(reduction.apply_positions(tokens.positions), tokens.positions[:, index])
    labels = torch.arange(tokens.x.shape[0]) * 7
    torch.testing.assert_close(reduction.apply(labels), labels[index])
    assert reduction.apply(labels > 50).tolist() == (labels > 50)[index].tolist()


def test_a_plane_keeps_its_dtype_and_its_trailing_shape():
    tokens = batch()
    for name in ("pool", "uniform"):
        reduction = build(name).reduce(tokens, Budget.ratio(0.4))
        rows = reduction.index.numel()
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int8):
            plane = torch.ones(tokens.x.shape[0], 3, 2, dtype=dtype)
            out = reduction.apply(plane)
            assert (out.dtype, tuple(out.shape)) == (dtype, (rows, 3, 2))
            assert bool((out == 1).all())


def test_a_plane_of_another_length_is_refused():
    reduction = build("uniform").reduce(batch(), Budget.ratio(0.4))
    with pytest.raises(ValueError, match="one entry for each of the 131 tokens in dim 0"):
        reduction.apply(torch.zeros(130))
    with pytest.raises(ValueError, match=r"positions are \(axes, 131 tokens\)"):
        reduction.apply_positions(torch.zeros(131, 3, dtype=torch.int64))

"""Gradients across ranks: those of one device with the same columns, and as many bytes home as came."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tokenring as tr
from tests.sparse_attn.ranks import assert_equals_one_device, cut_at, random, run, small


def upstream(inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    q, _, v = inputs
    shape = *q.shape[:3], v.shape[3]
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=q.dtype)


@pytest.mark.parametrize("identify", ["pooled", "lse", "rescore", "every"])
@pytest.mark.parametrize("share", ["query", "key"])
def test_gradients_equal_one_device(identify: str, share: str) -> None:
    inputs = random(180, batch=2, dims=(16, 24))
    layout, options = tr.Layout.zigzag(180, 3), {"config": small(identify=identify, share=share)}
    do = upstream(inputs)
    assert_equals_one_device(run(3, layout, inputs, do, **options), layout, inputs, do, options)


def test_gradients_of_documents_and_kept_rows_over_an_uneven_cut() -> None:
    inputs = random(230, batch=2)
    layout = cut_at(230, 4, [50, 97, 140, 201], [0, 1, 3, 1, 0])
    options = {"config": small(identify="pooled"), "cu_seqlens": [0, 90, 90, 230], "keep": [12, 13, 30, 110, 111, 150]}
    do = upstream(inputs)
    assert_equals_one_device(run(4, layout, inputs, do, **options), layout, inputs, do, options)


def test_every_row_that_was_sent_comes_home_once() -> None:
    inputs = random(200)
    layout = tr.Layout.zigzag(200, 4)
    results = run(4, layout, inputs, upstream(inputs), config=small(identify="pooled"))
    plans = results[0][3].plans
    out = [next(p for p in plans if p.schedule == name) for name in ("anchor:halo", "anchor:stripes")]
    home = {p.schedule: p for p in results[0][3].backward_plans}
    for there, back in zip(out, ("anchor:gradients:halo", "anchor:gradients:stripes")):
        for source in range(4):
            for destination in range(4):
                assert home[back].bytes_sent(destination, source) == there.bytes_sent(source, destination)


def test_gradients_of_the_dense_path_are_tokenrings_own() -> None:
    inputs = random(120)
    layout, options = tr.Layout.zigzag(120, 3), {"config": small(theta=float("inf"))}
    do = upstream(inputs)
    assert_equals_one_device(run(3, layout, inputs, do, **options), layout, inputs, do, options, bytes_too=False)

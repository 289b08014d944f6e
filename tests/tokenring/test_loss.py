"""The spread loss equals the loss of the whole sequence, in value and in gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenring as tr
from tests.pool import Pool


def loss_and_gradient(
    group: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, layout: tr.Layout
) -> tuple:
    rank, weight = group.rank(), weight.detach().requires_grad_()
    loss = tr.cross_entropy(layout.shard(hidden, rank) @ weight, layout.shard_labels(labels, rank), group)
    loss.backward()
    return loss.detach(), weight.grad


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_value_is_the_global_mean_and_gradients_add_up(pool: Pool, world: int) -> None:
    make = torch.Generator().manual_seed(world)
    hidden = torch.randn(2, 11, 6, generator=make, dtype=torch.float64)
    weight = torch.randn(6, 9, generator=make, dtype=torch.float64)
    labels = torch.randint(0, 9, (2, 11), generator=make)
    labels[:, 4:7] = -100
    whole = weight.clone().requires_grad_()
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected = torch.nn.functional.cross_entropy((hidden @ whole).flatten(0, 1), shifted.flatten())
    expected.backward()
    results = pool.run(world, loss_and_gradient, hidden, weight, labels, tr.Layout.zigzag(11, world))
    for loss, _ in results:
        torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(sum(grad for _, grad in results), whole.grad, rtol=0, atol=1e-12)


def test_no_label_that_counts_gives_zero_and_wrong_shapes_are_refused() -> None:
    assert tr.cross_entropy(torch.randn(1, 2, 4), torch.full((1, 2), -100)) == 0
    with pytest.raises(ValueError, match=r"must be \(batch, rows, vocabulary\)"):
        tr.cross_entropy(torch.randn(1, 2, 4), torch.zeros(1, 3, dtype=torch.int64))

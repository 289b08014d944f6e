"""Bits that do not depend on shape or place: what makes every partition give the same choice."""

from __future__ import annotations

import pytest
import torch

from token_reduction.rows import UnitRows, cosine, item_mean, pack, pair_sum, unpack
from tokenring import run_local
from tokenring.transport import connect


@pytest.mark.parametrize("width", [1, 3, 64, 384, 897])
def test_distances_have_the_same_bits_in_every_blocking(width):
    x = 3 * torch.randn(515, width, generator=torch.Generator().manual_seed(width)) + 1.0
    units = UnitRows(x)
    others, half = units.take(slice(None)), units.half
    whole = torch.cat([distance for _, distance in units.distances(None, others, half)])
    assert bool((whole == whole.T).all())
    assert bool((whole.diagonal() == 0).all())
    for rows in ([0], [514], list(range(3, 8)), list(range(0, 515, 7)), list(range(100, 357))):
        alone = UnitRows(x[rows].clone())
        assert bool((alone.half == units.half[rows]).all())
        for columns in ([7], [2, 500], list(range(64)), list(range(1, 130))):
            distance = torch.cat([part for _, part in alone.distances(None, others[columns], half[columns])])
            assert bool((distance == whole[rows][:, columns]).all())


def test_no_order_of_summation_changes_a_dot_product():
    units = UnitRows(torch.randn(64, 300, generator=torch.Generator().manual_seed(0)))
    q = units.take(slice(None))
    expected = q @ q.T
    shuffled = q[:, torch.randperm(300, generator=torch.Generator().manual_seed(1))]
    assert bool((shuffled @ shuffled.T == (q.flip(1) @ q.flip(1).T)).all())
    assert bool((expected == (q[:, None] * q[None]).flip(2).sum(-1)).all())


def test_distances_are_one_minus_cosine_to_a_ten_millionth():
    x = torch.randn(200, 384, generator=torch.Generator().manual_seed(3)).double()
    units = UnitRows(x)
    ((_, distance),) = units.distances(None, units.take(slice(None)), units.half)
    expected = 1 - torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    assert float((distance - expected).abs().max()) < 1e-7


def test_pair_sum_and_cosine_do_not_depend_on_the_number_of_rows():
    a = torch.randn(333, 77, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = torch.randn(333, 77, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(pair_sum(a), a.sum(1))
    torch.testing.assert_close(cosine(a, b), torch.nn.functional.cosine_similarity(a, b))
    for rows in (slice(0, 1), slice(5, 8), slice(17, 300)):
        assert bool((pair_sum(a[rows].clone()) == pair_sum(a)[rows]).all())
        assert bool((cosine(a[rows].clone(), b[rows].clone()) == cosine(a, b)[rows]).all())
    assert cosine(a, a).tolist() == [1.0] * 333
    assert cosine(a[:1], 0 * a[:1]).tolist() == [0.0]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_the_mean_has_the_same_bits_on_any_partition(scale):
    x = scale * (torch.randn(101, 9, generator=torch.Generator().manual_seed(0)) + 5.0)
    alone = item_mean(x, 101, connect(None))
    torch.testing.assert_close(alone, x.double().mean(0), rtol=1e-12, atol=0.0)
    cuts = [x[:0], x[0:70], x[70:71], x[71:]]
    for mean in run_local(4, lambda group: item_mean(cuts[group.rank()], 101, connect(group))):
        assert bool((mean == alone).all())
    assert item_mean(torch.zeros(4, 2), 4, connect(None)).tolist() == [0.0, 0.0]


def test_rows_on_the_wire_lose_nothing():
    units = UnitRows(torch.cat([torch.randn(50, 7, generator=torch.Generator().manual_seed(0)), -torch.eye(7)]))
    head = torch.stack(
        [units.half, torch.arange(57.0, dtype=torch.float64), torch.full_like(units.half, -torch.inf)], 1
    )
    packed = pack(head, units.take(slice(None)))
    assert packed.dtype == torch.int32
    again, rows = unpack(packed, 3)
    assert bool((again == head).all())
    assert bool((rows == units.take(slice(None))).all())

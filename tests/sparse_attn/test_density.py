"""A theta for a density: near what was asked, and the same on every rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tokenring as tr
from sparse_attn import AnchorConfig, plan, theta_for_density
from sparse_attn.distributed import group_layout

CONFIG = AnchorConfig(block=8, step=4, dense="never")


@pytest.fixture(scope="module")
def qk() -> tuple[torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    return torch.randn(1, 1100, 4, 16, generator=make), torch.randn(1, 1100, 2, 16, generator=make)


@pytest.mark.parametrize("identify", ["rescore", "pooled"])
def test_the_density_that_comes_about_is_near_what_was_asked(
    qk: tuple[torch.Tensor, torch.Tensor], identify: str
) -> None:
    config, (q, k) = replace(CONFIG, identify=identify), qk
    layout = group_layout(1100, 3, config)

    def rank(group: tr.LocalGroup) -> float:
        mine = (layout.shard(x, group.rank()) for x in qk)
        return theta_for_density(*mine, 0.3, config=config, group=group, layout=layout)

    spread = tr.run_local(3, rank)
    assert len(set(spread)) == 1
    for theta in (theta_for_density(q, k, 0.3, config=config), spread[0]):
        assert plan(q, k, config=replace(config, theta=theta)).density == pytest.approx(0.3, abs=0.1)


def test_rows_on_top_of_a_spread_cache_come_near_what_was_asked(qk: tuple[torch.Tensor, torch.Tensor]) -> None:
    (q, k), before, world = qk, 500, 3
    chunk, first = tr.Layout.zigzag(1100 - before, world, before), tr.Layout.zigzag(before, world)
    cache = tr.Layout.from_runs([[*first.segments(r), *chunk.segments(r)] for r in range(world)])

    def rank(group: tr.LocalGroup) -> float:
        mine = chunk.shard(q[:, before:], group.rank()), cache.shard(k, group.rank())
        return theta_for_density(*mine, 0.3, config=CONFIG, group=group, layout=chunk, kv_layout=cache)

    spread = tr.run_local(world, rank)
    assert len(set(spread)) == 1
    for theta in (theta_for_density(q[:, before:], k, 0.3, config=CONFIG), spread[0]):
        found = plan(q[:, before:], k, config=replace(CONFIG, theta=theta))
        assert found.density == pytest.approx(0.3, abs=0.1)


def test_the_ends_are_the_anchor_region_and_dense_attention(qk: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert theta_for_density(*qk, 0.01, config=CONFIG) == -torch.inf
    assert theta_for_density(*qk, 1.0, config=CONFIG) == torch.inf
    with pytest.raises(ValueError, match="target is 0"):
        theta_for_density(*qk, 0.0)
    with pytest.raises(ValueError, match="got 1100 queries and 1099 keys"):
        theta_for_density(qk[0], qk[1][:, 1:], 0.5)
    ahead = tr.Layout.zigzag(1100, 1)
    with pytest.raises(ValueError, match="got 1099 queries and 1100 keys"):
        theta_for_density(qk[0][:, 1:], qk[1], 0.5, layout=ahead)

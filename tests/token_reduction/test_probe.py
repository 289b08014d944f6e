"""Probes: full attention maps are the oracle."""

from __future__ import annotations

import pytest
import torch

from tests.token_reduction.inside_cases import HEADS, everything
from token_reduction.inside import TEXT, VISUAL, Probe
from tokenring import run_local
from tokenring.transport import connect


def test_probes_equal_the_full_map():
    p, a, _, probe, _ = everything()
    text, visual = (p.kinds == TEXT).nonzero()[:, 0], p.kinds == VISUAL
    torch.testing.assert_close(probe.received(), a.mean((0, 1)))
    torch.testing.assert_close(probe.received(text), a[:, text].mean((0, 1)))
    torch.testing.assert_close(probe.row(30), a[:, 30].mean(0))
    torch.testing.assert_close(probe.shares(text, visual), a[:, text][..., visual].sum(-1))
    assert probe.share(text, visual) == pytest.approx(float(a[:, text][..., visual].sum(-1).mean().detach()))


def test_pagerank_equals_power_iteration_over_the_full_map():
    _, _, _, probe, logits = everything(3)
    rows = torch.arange(logits.shape[1])
    m = torch.softmax((logits / 0.1).masked_fill(rows[:, None] < rows, -torch.inf), -1)
    d = torch.full((HEADS, 1, len(rows)), 1 / len(rows), dtype=torch.float64)
    for _ in range(5):
        d = d @ m
    torch.testing.assert_close(probe.pagerank(), d[:, 0].square().mean(0).sqrt())


@pytest.mark.parametrize("world", [2, 3, 5])
def test_probes_on_several_ranks_equal_one(world):
    p, _, _, whole, _ = everything(1)
    owner = torch.randint(0, world, (len(p.kinds),), generator=torch.Generator().manual_seed(world))
    owner[owner == 1] = 0  # a rank without a row
    text, visual = (p.kinds == TEXT).nonzero()[:, 0], p.kinds == VISUAL

    def work(group):
        mine = (owner == group.rank()).nonzero()[:, 0]
        probe = Probe(whole.q[mine], whole.k[mine], whole.lse[:, mine], mine, mine, transport=connect(group))
        return mine, probe.received(), probe.received(text), probe.shares(text, visual[mine]), probe.pagerank()

    for mine, received, from_text, shares, rank in run_local(world, work):
        torch.testing.assert_close(received, whole.received()[mine])
        torch.testing.assert_close(from_text, whole.received(text)[mine])
        torch.testing.assert_close(shares, whole.shares(text, visual))
        torch.testing.assert_close(rank, whole.pagerank()[mine])

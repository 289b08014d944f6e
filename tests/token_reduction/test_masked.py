"""The oracle of every method: the reduced run equals the full run with the removed keys masked.

A small decoder layer with M-RoPE positions and a DeepStack plane sees text, visual tokens and text. For a method that prunes, its
kept rows must give what they give in the full run where every removed token is masked as a key. For one that merges, the full
run's anchors hold the merged features first. Text is compared too; its rows and positions are never touched.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.token_reduction.cases import METHODS, batch
from token_reduction import Budget, build

WIDTH, HEADS = 12, 2
HALF = WIDTH // HEADS // 2


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """M-RoPE: one third of the rotary pairs follows each axis. x (heads, S, 6), positions (3, S)."""
    angle = positions[torch.arange(HALF) % 3].double().T * (100.0 ** (-torch.arange(HALF).double() / HALF))
    a, b = x[..., :HALF], x[..., HALF:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def layer(hidden: Tensor, positions: Tensor, weights: list[Tensor], alive: Tensor | None = None) -> Tensor:
    """Two causal layers in float64; keys that are not alive are masked for everyone but themselves."""
    order = torch.arange(len(hidden))
    allowed = order[:, None] >= order
    if alive is not None:
        allowed = (allowed & alive) | torch.eye(len(hidden), dtype=torch.bool)
    for w in weights:
        q, k, v = (hidden @ part for part in w.split(WIDTH, 1))
        q, k, v = (part.view(-1, HEADS, WIDTH // HEADS).transpose(0, 1) for part in (q, k, v))
        logits = rotate(q, positions) @ rotate(k, positions).mT / (WIDTH // HEADS) ** 0.5
        hidden = hidden + (logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)
    return hidden


@pytest.mark.parametrize("name", ["identity", *METHODS])
def test_a_reduced_run_equals_the_full_run_with_the_removed_keys_masked(name):
    tokens = batch(((5, 4, 4),), width=WIDTH)
    budget = Budget.ratio(1.0 if name == "identity" else 0.35)
    reduction = build(name).reduce(tokens, budget)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(WIDTH, 3 * WIDTH, generator=g, dtype=torch.float64) / 4 for _ in range(2)]
    text = torch.randn(7, WIDTH, generator=g, dtype=torch.float64)
    plane = torch.randn(tokens.x.shape[0], WIDTH, generator=g, dtype=torch.float64)
    before, after = torch.arange(4).repeat(3, 1), torch.arange(200, 203).repeat(3, 1)

    reduced = reduction.apply(tokens.x.double()) + reduction.apply(plane)
    short = torch.cat([text[:4], reduced, text[4:]])
    where = torch.cat([before, reduction.apply_positions(tokens.positions), after], 1)
    got = layer(short, where, weights)

    full = tokens.x.double() + plane
    full[reduction.index] = reduced
    alive = torch.ones(len(full) + 7, dtype=torch.bool)
    alive[4 : 4 + len(full)] = False
    alive[4 + reduction.index] = True
    everything = layer(
        torch.cat([text[:4], full, text[4:]]), torch.cat([before, tokens.positions, after], 1), weights, alive
    )
    torch.testing.assert_close(got, everything[alive], atol=1e-10, rtol=1e-10)

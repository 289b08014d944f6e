"""Training DyVTE's gates: only they learn, from what happened when the picture left after a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from token_reduction.inside.policies import DyVTEGates


def exit_labels(unchanged: Tensor, loss: Tensor, full_loss: Tensor) -> Tensor:
    """1 where the picture may leave: more than 99% of the answer's tokens unchanged and loss below 1.03 x the full run's.

    Args:
        unchanged: share of answer tokens that are the same; loss, full_loss: mean losses; all of one shape.

    >>> exit_labels(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]))
    tensor([1, 0])
    """
    return ((unchanged > 0.99) & (loss < 1.03 * full_loss)).long()


def train_gates(
    gates: DyVTEGates,
    features: Tensor,
    layers: Tensor,
    labels: Tensor,
    *,
    steps: int = 200,
    rate: float = 1e-3,
    batch: int = 64,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> float:
    """Cross-entropy of the gates on (features, layer, label) triples; returns the last mean loss.

    Args:
        features: (n, 2 D) from `DyVTEGates.features` after a randomly drawn exit layer. layers, labels: (n,) int64.
    """
    if not len(features) == len(layers) == len(labels):
        raise ValueError(f"one layer and label for each feature, got {len(features)}, {len(layers)}, {len(labels)}")
    chance = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(gates.parameters(), lr=rate)
    value = float("nan")
    for step in range(steps):
        drawn = torch.randperm(len(features), generator=chance)[:batch]
        parts = [drawn[layers[drawn] == layer] for layer in layers[drawn].unique()]
        losses = [
            torch.nn.functional.cross_entropy(
                gates(features[part], int(layers[part[0]])), labels[part], reduction="sum"
            )
            for part in parts
        ]
        loss = torch.stack(losses).sum() / len(drawn)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        value = float(loss.detach())
        if progress:
            progress(step, value)
    return value

"""Theta for each layer and head, so that a target is met: `tune`, and what it returns as JSON.

    recall    the smallest theta of a head whose mass recall, mean over the samples, reaches the target
    loss      the smallest recall target whose thetas keep a measured loss at or below the target

A head's recall rises with its theta and does not depend on other heads', so all heads of a layer are bisected together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sparse_attn.api import plan
from sparse_attn.config import AnchorConfig
from sparse_attn.metrics import mass_recall

Sample = Mapping[int, tuple[Tensor, Tensor]] | Sequence[tuple[Tensor, Tensor]]
"""q (B, S, Hq, D) and k (B, S, Hkv, D) of each layer: a sequence, or a mapping where some layers are left out."""
Loss = Callable[["TunedConfig"], float]

LOWEST, HIGHEST = -8.0, 24.0
FORMAT = 1


@dataclass(frozen=True)
class TunedConfig:
    """One `AnchorConfig` a layer, with a theta a head. Save it beside a model; nothing needs it to start."""

    layers: dict[int, AnchorConfig]
    metric: str
    target: float
    reached: float
    """The metric that the samples gave."""

    def layer(self, number: int) -> AnchorConfig:
        """The configuration of a layer; of the nearest one that was tuned, where this one was not."""
        return self.layers[min(self.layers, key=lambda known: (abs(known - number), known))]

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        layers = {str(number): asdict(config) for number, config in self.layers.items()}
        told = {"format": FORMAT, "metric": self.metric, "target": self.target, "reached": self.reached}
        Path(path).write_text(json.dumps(told | {"layers": layers}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> TunedConfig:
        """Read what `save` wrote; ValueError for anything else."""
        try:
            told = json.loads(Path(path).read_text())
            if told["format"] != FORMAT:
                raise ValueError(f"format {told['format']}")
            layers = {int(n): AnchorConfig(**_tupled(options)) for n, options in told["layers"].items()}
            return cls(layers, told["metric"], told["target"], told["reached"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a tuned configuration of format {FORMAT} ({error}); make one with sparse_attn.tune"
            ) from error


def tune(
    samples: Sequence[Sample],
    *,
    target: float,
    metric: str = "recall",
    config: AnchorConfig | None = None,
    loss: Loss | None = None,
    steps: int = 8,
) -> TunedConfig:
    """Find thetas on samples of a model's own queries and keys.

    Args:
        samples: one entry a text.
        target: mass recall to reach, or with `metric="loss"` the largest loss allowed.
        loss: `metric="loss"`: called with a configuration, gives what it costs, for example the rise in nats a token.
        config: everything but theta; `AnchorConfig(dense="never")` where not given.
        steps: halvings of the range of theta, and of the range of recall for a loss.

    >>> q, k = torch.randn(1, 300, 2, 16), torch.randn(1, 300, 1, 16)
    >>> tuned = tune([[(q, k)]], target=0.9, config=AnchorConfig(block=8, step=4, dense="never"))
    >>> tuned.reached >= 0.9, len(tuned.layer(0).theta)
    (True, 2)
    """
    config = AnchorConfig(dense="never") if config is None else config
    if metric not in ("recall", "loss") or (metric == "loss") != (loss is not None):
        raise ValueError(f'metric is {metric!r}, loss {loss!r}; give metric="recall", or "loss" with loss= a function')
    if not samples or not all(len(sample) for sample in samples):
        raise ValueError("samples hold no layers; give one sample or more, each with q and k of one layer or more")
    if metric == "recall":
        if not 0 < target < 1:
            raise ValueError(f"target is {target}; a mass recall lies between 0 and 1")
        return _for_recall(samples, target, config, steps)
    return _for_loss(samples, target, config, steps, loss)


def _for_loss(
    samples: Sequence[Sample], target: float, config: AnchorConfig, steps: int, loss: Loss | None
) -> TunedConfig:
    assert loss is not None
    low, high, best = 0.5, 1.0, None
    for _ in range(steps):
        middle = (low + high) / 2
        found = _for_recall(samples, middle, config, steps)
        cost = float(loss(found))
        if cost <= target:
            high, best = middle, replace(found, metric="loss", target=target, reached=cost)
        else:
            low = middle
    if best is None:
        raise ValueError(
            f"no thetas kept the loss at or below {target}; raise the target, or give more steps than {steps}"
        )
    return best


def _for_recall(samples: Sequence[Sample], target: float, config: AnchorConfig, steps: int) -> TunedConfig:
    by_layer: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for sample in samples:
        for number, qk in sample.items() if isinstance(sample, Mapping) else enumerate(sample):
            by_layer.setdefault(number, []).append(qk)
    layers, reached = {}, []
    for number, pairs in by_layer.items():
        layers[number], recall = _layer(pairs, target, config, steps)
        reached.append(recall)
    return TunedConfig(layers, "recall", target, sum(reached) / len(reached))


def _layer(
    pairs: Sequence[tuple[Tensor, Tensor]], target: float, config: AnchorConfig, steps: int
) -> tuple[AnchorConfig, float]:
    """The thetas of one layer's heads, and the recall they give."""
    heads = pairs[0][0].shape[2]
    low, high = torch.full((heads,), LOWEST), torch.full((heads,), HIGHEST)
    for _ in range(steps):
        middle = (low + high) / 2
        enough = _recall(pairs, replace(config, theta=tuple(middle.tolist()))) >= target
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
    found = replace(config, theta=tuple(round(t, 4) for t in high.tolist()))
    return found, float(_recall(pairs, found).mean())


def _recall(pairs: Sequence[tuple[Tensor, Tensor]], config: AnchorConfig) -> Tensor:
    """(Hq): mass recall, mean over samples and batch entries."""
    found = [mass_recall(q, k, plan(q, k, config=config)).heads.mean(0) for q, k in pairs]
    return torch.stack(found).mean(0).float()


def _tupled(options: dict) -> dict:
    """JSON has lists only; infinity is written as JavaScript does, which Python reads."""
    theta = options["theta"]
    return options | {"theta": tuple(theta) if isinstance(theta, list) else theta}

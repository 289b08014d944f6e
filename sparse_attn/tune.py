"""Theta for each layer and head, so that a target is met: `tune`, and what it returns as JSON.

    recall    the smallest theta of a head whose mass recall, mean over the samples, reaches the target
    density   thetas that together compute a share `target` of the causal pairs and lose the least:
                  minimize over thetas   sum over heads of squared_h(theta_h) + price * pairs_h(theta_h)
              one price for all heads of all layers: the pair that is left out last costs as much everywhere. The square counts
              rows that lose much above many that lose little: those are the rows that retrieve and copy
    loss      the least density whose thetas keep a measured loss at or below the target

What each theta computes and loses is read off a few groups of each sample (`sparse_attn.curves`), so tuning costs a fraction of
one dense attention pass, and a loss some runs of the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor

from sparse_attn.config import AnchorConfig
from sparse_attn.curves import THETAS, Curves, curves

Sample = Mapping[int, tuple[Tensor, Tensor]] | Sequence[tuple[Tensor, Tensor]]
"""q (B, S, Hq, D) and k (B, S, Hkv, D) of each layer: a sequence, or a mapping where some layers are left out."""
Loss = Callable[["TunedConfig"], float]

METRICS = ("recall", "density", "loss")
FIRST_DENSITY = 0.2
"""Tried first for a loss."""
FALL = 2.0
"""A loss falls about with this power of the density, until two measurements say better."""
FORMAT = 1


@dataclass(frozen=True)
class TunedConfig:
    """One `AnchorConfig` a layer, with a theta a head. Save it beside a model; nothing needs it to start."""

    layers: dict[int, AnchorConfig]
    metric: str
    target: float
    reached: float
    """The metric that the samples gave."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a tuned configuration has one layer or more, got none; make one with sparse_attn.tune")

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


@dataclass
class Tuner:
    """Takes in queries and keys a layer at a time and keeps curves only, so that no text's queries have to be held.

    >>> import torch
    >>> tuner = Tuner(AnchorConfig(block=8, step=4, dense="never"))
    >>> tuner.watch(0, torch.randn(1, 300, 2, 16), torch.randn(1, 300, 1, 16))
    >>> tuned = tuner.tune(target=0.5, metric="density")
    >>> 0.3 < tuned.reached <= 0.5
    True
    """

    config: AnchorConfig = field(default_factory=lambda: AnchorConfig(dense="never"))
    """Everything but theta."""
    groups: int = 8
    """Groups of rows to look at in each text."""
    seen: dict[int, list[Curves]] = field(default_factory=dict)

    def watch(self, layer: int, q: Tensor, k: Tensor, scale: float | None = None) -> None:
        """One layer of one text: q (B, S, Hq, D), k (B, S, Hkv, D). Fits `sparse_prefill(watch=tuner.watch)`."""
        known, found = self.seen.setdefault(layer, []), curves(q, k, self.config, scale, self.groups)
        if known and known[0].pairs.shape != found.pairs.shape:
            raise ValueError(
                f"layer {layer} has {len(found.pairs)} heads in this text and had {len(known[0].pairs)}; give texts of one model"
            )
        known.append(found)

    def tune(self, *, target: float, metric: str = "recall", loss: Loss | None = None, steps: int = 5) -> TunedConfig:
        """As the function `tune`."""
        if metric not in METRICS or (metric == "loss") != (loss is not None):
            raise ValueError(
                f'metric is {metric!r}, loss {loss!r}; give metric="recall" or "density", or "loss" with loss= a function'
            )
        if not self.seen:
            raise ValueError("samples hold no layers; give one sample or more, each with q and k of one layer or more")
        if metric == "loss" and not math.isfinite(target):
            raise ValueError(f"target is {target}; give the largest loss allowed, a finite number")
        if metric != "loss" and not 0 < target < 1:
            raise ValueError(f"target is {target}; a {metric} lies between 0 and 1")
        layers = {number: Curves.mean(found) for number, found in sorted(self.seen.items())}
        if metric == "recall":
            return self._made(layers, {n: _for_recall(c, target) for n, c in layers.items()}, metric, target)
        if metric == "density":
            return self._made(layers, _for_density(layers, target), metric, target)
        assert loss is not None
        return self._for_loss(layers, target, loss, steps)

    def _made(
        self, layers: Mapping[int, Curves], thetas: Mapping[int, Sequence[float]], metric: str, target: float
    ) -> TunedConfig:
        configs, pairs, lost = {}, [], []
        for number, curve in layers.items():
            found = tuple(round(t, 4) for t in thetas[number])
            configs[number] = replace(self.config, theta=found)
            for values, value in zip((pairs, lost), curve.at(found)):
                values.append(float(value.mean()))
        reached = sum(pairs) / len(pairs) if metric == "density" else 1 - sum(lost) / len(lost)
        return TunedConfig(configs, metric, target, reached)

    def _for_loss(self, layers: Mapping[int, Curves], target: float, loss: Loss, steps: int) -> TunedConfig:
        density, best = FIRST_DENSITY, None
        low, high = (0.0, math.inf), (1.0, 0.0)
        for _ in range(steps):
            found = self._made(layers, _for_density(layers, density), "density", density)
            cost = float(loss(found))
            if math.isnan(cost):
                raise ValueError(f"loss gave nan at density {density:.3f}; it must give a number")
            if cost <= target:
                best, high = replace(found, metric="loss", target=target, reached=cost), (density, cost)
            else:
                low = (density, cost)
            density = _next_density(low, high, target)
        if best is None:
            raise ValueError(
                f"no thetas kept the loss at or below {target}; raise the target, or give more steps than {steps}"
            )
        return best


def _next_density(low: tuple[float, float], high: tuple[float, float], target: float) -> float:
    """Where a loss that falls with a power of the density would meet the target, kept inside what is known."""
    (too_low, dear), (enough, cheap) = low, high
    power = FALL
    if too_low > 0 and cheap > 0 and enough < 1:
        power = max(0.5, math.log(dear / cheap) / math.log(enough / too_low))
    if cheap > 0:
        found = enough * (cheap / target) ** (1 / power)
    elif math.isfinite(dear) and target > 0:
        found = too_low * (dear / target) ** (1 / power)
    else:
        found = (too_low + enough) / 2
    room = 0.1 * (enough - too_low)
    return min(max(found, too_low + room), enough - room)


def _for_recall(curve: Curves, target: float) -> list[float]:
    """For each head the smallest theta at which no more than 1 - target is lost."""
    return [float(THETAS[min(int((row > 1 - target).sum()), len(THETAS) - 1)]) for row in curve.lost]


def _for_density(layers: Mapping[int, Curves], target: float) -> dict[int, list[float]]:
    """The thetas of the price at which all heads together compute a share `target` of the pairs."""
    low, high = -40.0, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        chosen = {number: _at_price(curve, math.exp(middle)) for number, curve in layers.items()}
        dense = sum(float(layers[n].pairs.gather(1, at[:, None]).mean()) for n, at in chosen.items()) / len(layers)
        low, high = (middle, high) if dense > target else (low, middle)
    chosen = {number: _at_price(curve, math.exp(high)) for number, curve in layers.items()}
    return {number: THETAS[at].tolist() for number, at in chosen.items()}


def _at_price(curve: Curves, price: float) -> Tensor:
    """int64 (Hq): which theta of each head costs least."""
    return (curve.squared + price * curve.pairs).argmin(1)


def tune(
    samples: Sequence[Sample],
    *,
    target: float,
    metric: str = "recall",
    config: AnchorConfig | None = None,
    loss: Loss | None = None,
    steps: int = 5,
    groups: int = 8,
) -> TunedConfig:
    """Find thetas on samples of a model's own queries and keys.

    Args:
        samples: one entry a text. `Tuner` takes them in layer by layer where they are too large to be held.
        target: mass recall to reach in every head; with `metric="density"` the share of causal pairs to compute; with
            `metric="loss"` the largest loss allowed.
        config: everything but theta; `AnchorConfig(dense="never")` where not given.
        loss: `metric="loss"`: called with a configuration, gives what it costs, for example the rise in nats a token.
        steps: calls of `loss`.
        groups: groups of rows that are looked at in each text.

    >>> import torch
    >>> q, k = torch.randn(1, 300, 2, 16), torch.randn(1, 300, 1, 16)
    >>> tuned = tune([[(q, k)]], target=0.9, config=AnchorConfig(block=8, step=4, dense="never"))
    >>> tuned.reached >= 0.9, len(tuned.layer(0).theta)
    (True, 2)
    """
    tuner = Tuner(AnchorConfig(dense="never") if config is None else config, groups)
    for sample in samples:
        for number, pair in sample.items() if isinstance(sample, Mapping) else enumerate(sample):
            if len(pair) != 2:
                raise ValueError(f"layer {number} of a sample holds {len(pair)} tensors; give (q, k) of each layer")
            tuner.watch(number, *pair)
    return tuner.tune(target=target, metric=metric, loss=loss, steps=steps)


def _tupled(options: dict) -> dict:
    """JSON has lists only; infinity is written as JavaScript does, which Python reads."""
    theta = options["theta"]
    return options | {"theta": tuple(theta) if isinstance(theta, list) else theta}

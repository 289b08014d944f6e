"""The published policies inside the model, each built by a function of its parameters or a small class.

Layers count from 0 and a schedule acts after its layer, so "at layer K" of a paper that counts from 1 is K - 1 here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from token_reduction.exact import nearest, rest, top, unit_rows
from token_reduction.inside.policy import LayerPolicy, Scheduled
from token_reduction.inside.view import TEXT, VISUAL, Decision, View, drop_all


def fastv(layer: int = 2, keep: float = 0.222) -> Scheduled:
    """FastV: once, by the last row's attention (K = 3, R = 0.778). Source: Chen et al., ECCV 2024."""
    return Scheduled(name="fastv", schedule={layer: keep}, scorer="last_row")


def pyramiddrop(layers: int = 32) -> Scheduled:
    """PyramidDrop: halve after each quarter of the depth, by the last instruction row. Source: Xing et al., CVPR 2025."""
    if layers < 4:
        raise ValueError(f"pyramiddrop acts after each quarter of the layers, got {layers!r}; give 4 or more")
    return Scheduled(name="pyramiddrop", schedule={q * layers // 4 - 1: 0.5**q for q in (1, 2, 3)}, scorer="last_row")


def sparsevlm(keep: float = 1 / 3, layers: tuple[int, ...] = (2, 6, 15), recycle: float = 0.3) -> Scheduled:
    """SparseVLM: text raters score; what leaves is partly merged into what stays. Shares fall evenly to `keep`."""
    shares = {layer: keep ** ((i + 1) / len(layers)) for i, layer in enumerate(layers)}
    return Scheduled(name="sparsevlm", schedule=shares, scorer="raters", recycle=recycle)


def aim(layers: int = 28, start: int = 14, length: int = 8) -> Scheduled:
    """AIM stage 2: keep 1 - (l - start + 1)/length entering layer l >= start, by PageRank of the layer before.

    >>> round(aim().mean_share(28), 3)
    0.625
    """
    entered = range(start, min(layers, start + length))
    shares = {layer - 1: max(0.0, 1 - (layer - start + 1) / length) for layer in entered}
    return Scheduled(name="aim", schedule=shares, scorer="pagerank")


def vtw(layer: int) -> Scheduled:
    """VTW: every visual row leaves before layer K = `layer`, 1 or more. Source: Lin et al., AAAI 2025; `fit.fit_withdrawal` finds K."""
    if layer < 1:
        raise ValueError(f"visual rows leave before layer 1 or later, got {layer!r}; without layer 0 give no pictures")
    return Scheduled(name="vtw", schedule={layer - 1: 0.0})


def vflowopt(first: float, second: float, layers: tuple[int, int] = (9, 18)) -> Scheduled:
    """VFlowOpt's decoder stages: by the importance carried from the encoder; shares of the rows that entered the model."""
    return Scheduled(name="vflowopt", schedule={layers[0] - 1: first, layers[1] - 1: first * second}, scorer="carried")


def adatoken(schedule: dict[int, float]) -> Scheduled:
    """AdaToken-3D: by attention flow from text, in any schedule (the paper's own is not public: ours)."""
    return Scheduled(name="adatoken", schedule=schedule, scorer="flow")


def psigmoid(layers: int, steepness: float, centre: float, floor: float = 0.0, scorer: str = "last_row") -> Scheduled:
    """P-Sigmoid: share after layer l = floor + (1 - floor) / (1 + exp(steepness (l - centre))), never rising.

    >>> [round(s, 2) for s in psigmoid(4, 2.0, 1.5).schedule.values()]
    [0.95, 0.73, 0.27]
    """

    def share(layer: int) -> float:
        return floor + (1 - floor) / (1 + math.exp(min(700.0, steepness * (layer - centre))))

    shares = {layer: share(layer) for layer in range(layers - 1)}
    return Scheduled(name="psigmoid", schedule=shares, scorer=scorer)


@dataclass(frozen=True, kw_only=True)
class ToDREStage2(LayerPolicy):
    """After `layer` (7L/8) every visual row leaves iff text and picture have stopped looking at each other:
    both shares of attention, text rows on visual columns and visual rows on text columns, are below `tau`."""

    name: str = "todre_stage2"
    layer: int = 27
    tau: float = 0.10

    @property
    def acts_after(self) -> tuple[int, ...]:
        return (self.layer,)

    def after(self, view: View) -> Decision | None:
        if view.layer != self.layer:
            return None
        text, seen = view.rows(TEXT), view.visual
        columns = torch.zeros(2, len(view.alive), dtype=torch.bool, device=text.device)
        columns[0, seen], columns[1, text] = True, True
        shares = view.probe.share(view.alive[text], columns[0]), view.probe.share(view.alive[seen], columns[1])
        return drop_all(view) if max(shares) < self.tau else None


@dataclass(frozen=True, kw_only=True)
class VisionDropStages(LayerPolicy):
    """VisionDrop after the encoder: attention received from visual rows picks the dominant ones, the others gather at evenly
    spaced targets by the cosine of their keys, mean over heads. `stages`: layer -> (dominant, contextual).

    Queries and keys are those of the next layer, as published; `ahead=False` takes the layer's own, which costs nothing, as does
    a stage behind the last layer. Targets become means; the released code adds the mean of what joins to the target."""

    name: str = "visiondrop"
    stages: dict[int, tuple[int, int]] = field(default_factory=lambda: {7: (30, 5), 15: (22, 4), 23: (16, 3)})
    ahead: bool = True

    @property
    def acts_after(self) -> tuple[int, ...]:
        return tuple(self.stages)

    def after(self, view: View) -> Decision | None:
        dominant, contextual = self.stages.get(view.layer, (len(view.visual), 0))
        if dominant + contextual >= len(view.visual):
            return None
        probe = view.ahead() if self.ahead and view.ahead is not None else view.probe
        score = probe.received(view.alive[view.visual])[view.visual]
        first = top(score, dominant)
        others = rest(len(score), first)
        targets = others[:: max(1, len(others) // max(1, contextual))][:contextual]
        keep = torch.cat([first, targets]).sort().values
        matrix = torch.zeros(len(keep), len(score), dtype=torch.float64, device=score.device)
        matrix[torch.arange(len(keep)), keep] = 1.0
        if contextual:
            keys = unit_rows(probe.k[view.visual].mean(1))
            joined = others[~torch.isin(others, targets)]
            place = torch.searchsorted(keep, targets.contiguous())
            matrix[place[nearest(keys[joined], keys[targets])], joined] = 1.0
        return Decision(keep, matrix / matrix.sum(1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class CatpStage2(LayerPolicy):
    """CATP inside an in-context prompt. After layer K: context rows by the rise of the last row's attention since layer K - 1
    plus `weight` times the cosine with the query sample's mean; one layer on: query rows by the cosine with what survived.

    `Prompt.samples` numbers the examples; the largest is the query. keep: share of each side that stays.
    """

    name: str = "catp_stage2"
    layer: int = 5
    keep: float = 0.5
    weight: float = 0.6

    @property
    def acts_after(self) -> tuple[int, ...]:
        return (self.layer, self.layer + 1)

    def after(self, view: View) -> Decision | None:
        if view.layer == self.layer - 1:
            return Decision(notes={"row": view.probe.row(view.last)})
        if view.layer not in (self.layer, self.layer + 1):
            return None
        if view.prompt.samples is None:
            raise ValueError("catp_stage2 needs Prompt.samples; number the examples, the query highest")
        samples = view.prompt.samples[view.alive]
        query = samples == samples.max()
        visual = view.prompt.kinds[view.alive] == VISUAL
        hidden = torch.nn.functional.normalize(view.hidden.double(), dim=1)
        if view.layer == self.layer:
            rise = (view.probe.row(view.last) - view.earlier["row"]).clamp_min(0).double()
            mean = torch.nn.functional.normalize(view.hidden[query].double().mean(0), dim=0)
            return self._keep(view, visual & ~query, rise + self.weight * (hidden @ mean))
        if not bool((visual & ~query).any()):
            return None
        mean = torch.nn.functional.normalize(view.hidden[~query].double().mean(0), dim=0)
        return self._keep(view, visual & query, hidden @ mean)

    def _keep(self, view: View, side: Tensor, score: Tensor) -> Decision:
        """Of the visual rows of one side the best; the other side whole."""
        own, places = side[view.visual], torch.arange(len(view.visual), device=score.device)
        rows = places[own]
        best = rows[top(score[view.visual][own], round(self.keep * len(rows)))]
        return Decision(torch.cat([places[~own], best]).sort().values)


class DyVTEGates(nn.Module):
    """DyVTE's gate per layer: Linear(2D, hidden), GELU, Linear(hidden, 2), no bias; input [mean of the text rows but the last,
    last row]; logit 1 above logit 0: the picture has been read. Source: Wu et al., "Accelerating Multimodal LLMs via Dynamic
    Visual-Token Exit and the Empirical Findings", section 4."""

    def __init__(self, width: int, layers: int, hidden: int = 2048) -> None:
        super().__init__()
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, 2, bias=False))
            for _ in range(layers)
        )

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(..., 2 D) -> (..., 2) logits."""
        return self.gates[layer](features)

    @staticmethod
    def features(text: Tensor) -> Tensor:
        """(2 D,) of the text rows after the pictures (n, D)."""
        return torch.cat([text[:-1].mean(0) if len(text) > 1 else text[-1], text[-1]])


@dataclass(frozen=True, kw_only=True, eq=False)
class DyVTE(LayerPolicy):
    """Every visual row leaves after the first layer whose gate says so. `fit.train_gates` trains the gates."""

    name: str = "dyvte"
    gates: DyVTEGates

    def after(self, view: View) -> Decision | None:
        if not len(view.visual):
            return None
        behind = view.rows(TEXT)
        with torch.no_grad():
            logits = self.gates(DyVTEGates.features(view.hidden[behind]), view.layer)
        return drop_all(view) if bool(logits[1] > logits[0]) else None

"""Layer forms: the same rows, but visual ones take a cheaper way through a layer.

window     visual rows see visual rows near them in their frame only                 YOPO
heads      some heads neither read visual columns nor write visual rows              YOPO
ffn        visual rows use the first share of the feed-forward width                 YOPO
frozen     visual rows ask nothing; each layer gets them from a projector of its own  SAISA / NAAViT
skip       some visual rows pass by a layer                                          VideoLLM-MoD
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from token_reduction.exact import top
from token_reduction.inside.view import VISUAL, Prompt


@dataclass(frozen=True, kw_only=True)
class Form:
    """The ordinary form; subclasses change parts."""

    def mask(self, layer: int, prompt: Prompt, queries: Tensor, keys: Tensor, causal: Tensor) -> Tensor:
        """(q, k) bool: which pairs attend; `causal` is what they would be otherwise."""
        return causal

    def cut_heads(self, layer: int, heads: int) -> Tensor | None:
        """(H,) bool: heads cut off from the picture, or None."""
        return None

    def ffn_share(self, layer: int) -> float:
        """Share of the feed-forward width that visual rows use."""
        return 1.0

    def given(self, layer: int, prompt: Prompt) -> Tensor | None:
        """(visual rows of the prompt, D) hidden states of this layer's input, where visual rows ask nothing; or None."""
        return None

    def passing(self, layer: int, prompt: Prompt, rows: Tensor, hidden: Tensor) -> Tensor | None:
        """(n,) bool of the alive rows: those that pass by this layer unchanged, or None."""
        return None


@dataclass(frozen=True, kw_only=True)
class Yopo(Form):
    """YOPO: neighbour window, head pruning, narrow feed-forward and, through a schedule, layer drop; fixed once found.

    Args:
        window: odd side w; visual rows of one frame see each other within (w - 1)/2 lines and columns, forwards too. 0: as is.
        heads: for each layer the heads cut off from the picture (`vote_heads` finds them).
        ffn: 1/p.

    Source: "Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See", section 3.
    """

    window: int = 0
    heads: tuple[tuple[int, ...], ...] = ()
    ffn: float = 1.0

    def __post_init__(self) -> None:
        if self.window and (self.window < 1 or self.window % 2 == 0):
            raise ValueError(f"a neighbour window has an odd side, got {self.window}; 7 is usual, 0 switches it off")
        if not 0 < self.ffn <= 1:
            raise ValueError(f"ffn is a share above 0 and at most 1, got {self.ffn!r}")

    def mask(self, layer: int, prompt: Prompt, queries: Tensor, keys: Tensor, causal: Tensor) -> Tensor:
        if not self.window:
            return causal
        if prompt.cells is None or prompt.frames is None:
            raise ValueError(
                "a neighbour window needs Prompt.cells and Prompt.frames; give line and column of visual rows"
            )
        both = (prompt.kinds[queries] == VISUAL)[:, None] & (prompt.kinds[keys] == VISUAL)
        apart = (prompt.cells[queries][:, None] - prompt.cells[keys]).abs().amax(-1)
        near = (apart <= (self.window - 1) // 2) & (prompt.frames[queries][:, None] == prompt.frames[keys])
        return torch.where(both, near, causal)

    def cut_heads(self, layer: int, heads: int) -> Tensor | None:
        if layer >= len(self.heads) or not self.heads[layer]:
            return None
        cut = torch.zeros(heads, dtype=torch.bool)
        cut[list(self.heads[layer])] = True
        return cut

    def ffn_share(self, layer: int) -> float:
        return self.ffn


def vote_heads(shares: Tensor, threshold: float, exempt: int = 2) -> tuple[tuple[int, ...], ...]:
    """Heads to cut, by majority over samples of (attention on visual) / (attention on other rows) < threshold.

    Args:
        shares: (samples, layers, H) attention mass on visual columns, 0..1, of text rows (`Probe.shares`).
        exempt: first layers that keep every head.

    >>> vote_heads(torch.tensor([[[0.5, 0.5], [0.01, 0.5]]]), 0.1, exempt=1)
    ((), (0,))
    """
    ratio = shares / (1 - shares).clamp_min(1e-12)
    cut = (ratio < threshold).float().mean(0) > 0.5
    return tuple(tuple(row.nonzero()[:, 0].tolist()) if i >= exempt else () for i, row in enumerate(cut))


@dataclass(frozen=True, kw_only=True, eq=False)
class Naavit(Form):
    """NAAViT: visual rows make keys and values but no queries and no feed-forward; each layer's visual input is that layer's
    projection of the encoder's features.

    Args:
        features: (visual rows, C) of the encoder. projectors: one module per layer, C -> D (`VisualProjectors`).

    Source: SAISA, "Towards Multimodal Large Language Models with Both Training and Inference Efficiency", sections 3 and 4.
    """

    features: Tensor
    projectors: nn.Module

    def given(self, layer: int, prompt: Prompt) -> Tensor:
        return self.projectors(self.features, layer)


class VisualProjectors(nn.Module):
    """One two-layer perceptron per decoder layer: Linear(C, D), GELU, Linear(D, D)."""

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width)) for _ in range(layers)
        )

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """(n, C) -> (n, D) for one layer."""
        return self.layers[layer](features)


@dataclass(frozen=True, kw_only=True, eq=False)
class Mod(Form):
    """VideoLLM-MoD: in each chosen layer a learned score picks the share of each frame's visual rows that is computed; the
    others pass by on the residual stream and come back after it.

    Args:
        routers: `ModRouters`, one score per layer and row. share: computed share of each frame, at least one row.
        layers: where rows pass by; None: everywhere but in the first.

    Source: VideoLLM-MoD, "Efficient Video-Language Streaming with Mixture-of-Depths Vision Computation", section 3.
    """

    routers: nn.Module
    share: float = 0.2
    layers: tuple[int, ...] | None = field(default=None)

    def passing(self, layer: int, prompt: Prompt, rows: Tensor, hidden: Tensor) -> Tensor | None:
        if (layer == 0) if self.layers is None else (layer not in self.layers):
            return None
        frames = prompt.frames[rows] if prompt.frames is not None else (prompt.kinds[rows] == VISUAL).long() - 1
        score = self.routers(hidden, layer)
        passing = frames >= 0
        for frame in frames[frames >= 0].unique():
            own = (frames == frame).nonzero()[:, 0]
            passing[own[top(score[own], max(1, round(self.share * len(own))))]] = False
        return passing


class ModRouters(nn.Module):
    """A linear score per layer and row."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.score = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(layers))

    def forward(self, hidden: Tensor, layer: int) -> Tensor:
        """(n, D) -> (n,)."""
        return self.score[layer](hidden)[:, 0]

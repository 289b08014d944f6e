"""What a layer policy is shown after a layer, and what it may answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from token_reduction.inside.probe import Probe

SYSTEM, VISUAL, TEXT = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt whose rows have kinds.

    Attributes:
        hidden: (S, D) input embeddings. positions: (P, S) int64; never renumbered.
        kinds: (S,) int64, SYSTEM (before the pictures), VISUAL or TEXT.
        frames: (S,) int64 frame of a visual row, -1 elsewhere. cells: (S, 2) line and column in the frame.
        samples: (S,) int64 number of the example in an in-context prompt; the last number is the query.
        importance: (S,) a score made before the model and carried through it, or None.
        planes: (visual rows, layers, D) added to the visual rows after the first layers (DeepStack), or None. They leave and
            merge with their rows.
    """

    hidden: Tensor
    positions: Tensor
    kinds: Tensor
    frames: Tensor | None = None
    cells: Tensor | None = None
    samples: Tensor | None = None
    importance: Tensor | None = None
    planes: Tensor | None = None

    def __post_init__(self) -> None:
        rows = self.hidden.shape[0]
        if self.hidden.dim() != 2 or self.positions.shape[-1:] != (rows,) or self.positions.dim() != 2:
            raise ValueError(
                f"a prompt has hidden (S, D) and positions (P, S), got {tuple(self.hidden.shape)}, {tuple(self.positions.shape)}"
            )
        for name in ("kinds", "frames", "cells", "samples", "importance"):
            value = getattr(self, name)
            if value is not None and value.shape[0] != rows:
                raise ValueError(f"{name} has {value.shape[0]} entries for {rows} rows; give one for each")
        visual = int((self.kinds == VISUAL).sum())
        if self.planes is not None and (
            self.planes.dim() != 3 or self.planes.shape[::2] != (visual, self.hidden.shape[1])
        ):
            raise ValueError(
                f"planes are ({visual} visual rows, layers, {self.hidden.shape[1]}), got {tuple(self.planes.shape)}; "
                "give those of the visual rows of the prompt, in their order"
            )


@dataclass(frozen=True, eq=False)
class View:
    """After a layer: the rows that are alive and what that layer's attention did.

    Attributes:
        layer, layers: the layer that has just run, from 0, and how many there are.
        prompt: the whole prompt; alive: (n,) int64 its rows that are alive, ascending.
        hidden: (n, D) after the layer. probe: of the layer; keys: (n, Hk, D) its rotated keys, values alike.
        earlier: what the policy noted at earlier layers.
        ahead: a call that gives the probe of the next layer's queries and keys of these rows, or None behind the last layer.
    """

    layer: int
    layers: int
    prompt: Prompt
    alive: Tensor
    hidden: Tensor
    probe: Probe
    values: Tensor
    earlier: Mapping[str, Tensor] = field(default_factory=dict)
    ahead: Callable[[], Probe] | None = None

    def rows(self, kind: int) -> Tensor:
        """Alive rows of a kind, as places in `alive`."""
        return (self.prompt.kinds[self.alive] == kind).nonzero()[:, 0]

    @property
    def visual(self) -> Tensor:
        return self.rows(VISUAL)

    @property
    def total(self) -> int:
        """Visual rows of the whole prompt."""
        return int((self.prompt.kinds == VISUAL).sum())

    @property
    def last(self) -> int:
        """Number of the last row, the one that predicts."""
        return int(self.alive[-1])


@dataclass(frozen=True, eq=False)
class Decision:
    """Which visual rows go on to later layers.

    Attributes:
        keep: (m,) int64 places in `View.visual`, ascending.
        matrix: (m, v) float weights that make the kept visual hidden rows of the v alive ones, or None for the rows themselves.
        notes: what the policy wants to see again.
    """

    keep: Tensor | None = None
    matrix: Tensor | None = None
    notes: Mapping[str, Tensor] = field(default_factory=dict)


def drop_all(view: View) -> Decision:
    """No visual row goes on."""
    return Decision(torch.zeros(0, dtype=torch.int64, device=view.hidden.device))

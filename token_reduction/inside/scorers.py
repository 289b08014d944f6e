"""Scores of visual rows inside the model, each a function of a `View`: (v,) float, larger is better.

last_row      attention of the last row                                        FastV, PyramidDrop, HoliTom
raters        attention of the text rows that look at the picture most          SparseVLM
from_visual   attention received from visual rows                              VisionDrop
pagerank      power iteration over the layer's attention                       AIM
flow          attention from text x norm of the value: what really moves       AdaToken-3D (ours)
carried       importance made before the model                                 VFlowOpt
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from token_reduction.inside.view import TEXT, View

Scorer = Callable[[View], Tensor]


def last_row(view: View) -> Tensor:
    """Attention of the prompt's last row, mean over heads."""
    return view.probe.row(view.last)[view.visual]


def raters(view: View) -> Tensor:
    """Attention received from the text rows whose own attention to the picture is at least the mean of all text rows'.

    Source: SparseVLM, "Visual Token Sparsification for Efficient Vision-Language Model Inference", section 3.1.
    """
    text = view.alive[view.rows(TEXT)]
    columns = torch.zeros(len(view.alive), dtype=torch.bool, device=text.device)
    columns[view.visual] = True
    looks = view.probe.shares(text, columns).mean(0)
    return view.probe.received(text[looks >= looks.mean()])[view.visual]


def from_visual(view: View) -> Tensor:
    """Attention received from the visual rows that are alive."""
    return view.probe.received(view.alive[view.visual])[view.visual]


def pagerank(view: View) -> Tensor:
    """AIM's importance: five steps of power iteration at temperature 0.1."""
    return view.probe.pagerank()[view.visual]


def flow(view: View) -> Tensor:
    """Attention received from text rows times the norm of the value, summed over heads' groups."""
    text = view.alive[view.rows(TEXT)]
    return view.probe.received(text)[view.visual] * view.values[view.visual].flatten(1).norm(dim=1)


def carried(view: View) -> Tensor:
    """`Prompt.importance`."""
    if view.prompt.importance is None:
        raise ValueError(
            "the scorer carried needs Prompt.importance; give the scores of the reduction before the model"
        )
    return view.prompt.importance[view.alive[view.visual]]


SCORERS: dict[str, Scorer] = {
    "last_row": last_row,
    "raters": raters,
    "from_visual": from_visual,
    "pagerank": pagerank,
    "flow": flow,
    "carried": carried,
}

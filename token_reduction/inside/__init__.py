"""Reduction inside the language model: policies that let visual rows leave between layers, driven by probes.

>>> from token_reduction.inside import Scheduled, pyramiddrop
>>> pyramiddrop(32).schedule
{7: 0.5, 15: 0.25, 23: 0.125}
"""

from token_reduction.inside.forms import Form, Mod, ModRouters, Naavit, VisualProjectors, Yopo, vote_heads
from token_reduction.inside.policies import (
    CatpStage2,
    DyVTE,
    DyVTEGates,
    ToDREStage2,
    VisionDropStages,
    adatoken,
    aim,
    fastv,
    psigmoid,
    pyramiddrop,
    sparsevlm,
    vflowopt,
    vtw,
)
from token_reduction.inside.policy import LayerPolicy, Scheduled
from token_reduction.inside.probe import Probe
from token_reduction.inside.run import Block, LayerCache, Prefill, decode, prefill
from token_reduction.inside.view import SYSTEM, TEXT, VISUAL, Decision, Prompt, View

__all__ = [
    "SYSTEM",
    "TEXT",
    "VISUAL",
    "Block",
    "CatpStage2",
    "Decision",
    "DyVTE",
    "DyVTEGates",
    "Form",
    "LayerCache",
    "LayerPolicy",
    "Mod",
    "ModRouters",
    "Naavit",
    "Prefill",
    "Probe",
    "Prompt",
    "Scheduled",
    "ToDREStage2",
    "View",
    "VisionDropStages",
    "VisualProjectors",
    "Yopo",
    "adatoken",
    "aim",
    "decode",
    "fastv",
    "prefill",
    "psigmoid",
    "pyramiddrop",
    "sparsevlm",
    "vflowopt",
    "vote_heads",
    "vtw",
]

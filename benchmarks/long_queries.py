"""Queries and keys of a real language model over real text longer than it was trained for, captured once.

    q, k = captured(layer=15, length=65536)        SmolLM2-135M, the Python language reference; (1, length, 9 and 3 heads, 64)

Beyond 8,192 positions the rotary embedding is scaled by YaRN (arXiv 2309.00071), as transformers does it; every layer before
is dense. 32k takes minutes of one core and 64k some twenty, so the tensors are kept beside the demo's model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.assets import cache_dir

TRAINED_POSITIONS = 8192


class _Captured(Exception):
    """The layer was reached: nothing after it matters."""


def captured(layer: int, length: int) -> tuple[Tensor, Tensor]:
    """q (1, length, 9, 64) and k (1, length, 3, 64) of one layer, float32; from the cache folder where they were kept."""
    path = cache_dir() / f"queries-{layer}-{length}.pt"
    if not path.is_file():
        _capture([layer], length)
    found = torch.load(path, mmap=True, weights_only=True)
    return found["q"].float(), found["k"].float()


def _capture(layers: list[int], length: int) -> None:
    """Run the model up to the last of some layers and keep what each of them asks."""
    from transformers import AttentionInterface

    from benchmarks.sparse_attention_quality import Model

    made = Model(**_scaled(length))
    ids = made.ids("reference", length)
    if ids.shape[1] < length:
        raise ValueError(f"the text has {ids.shape[1]} tokens, {length} were asked for; give a smaller length")

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **_: Any) -> Any:
        if module.layer_idx in layers:
            _keep(cache_dir() / f"queries-{module.layer_idx}-{length}.pt", q, k)
        if module.layer_idx == max(layers):
            raise _Captured
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("capturing", attend)
    made.model.set_attn_implementation("capturing")
    with torch.inference_mode():
        try:
            made.model.model(ids, use_cache=False)
        except _Captured:
            return
    raise ValueError(f"the model has {made.model.config.num_hidden_layers} layers, layer {max(layers)} was asked for")


def _scaled(length: int) -> dict[str, Any]:
    """What the model's configuration says of positions, for a length."""
    if length <= TRAINED_POSITIONS:
        return {}
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 100000.0,
        "factor": length / TRAINED_POSITIONS,
        "original_max_position_embeddings": TRAINED_POSITIONS,
    }
    return {"rope_parameters": yarn, "max_position_embeddings": length}


def _keep(path: Path, q: Tensor, k: Tensor) -> None:
    """Whole or not at all: a run that is ended half way leaves no file behind."""
    part = path.with_suffix(".part")
    q, k = (x.transpose(1, 2).to(torch.bfloat16).contiguous().clone() for x in (q, k))
    torch.save({"q": q, "k": k}, part)
    part.rename(path)

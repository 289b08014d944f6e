"""SmolLM2-135M on real text with its attention replaced: what benchmarks of sparse prefill measure losses on.

Texts are the Python language reference and modules' sources, both part of any Python. The model is the demo's (`make setup`).
"""

from __future__ import annotations

import argparse
import inspect
import platform
import pydoc_data.topics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from launch.assets import cache_dir, demo_dir
from sparse_attn import compare_logits

CHUNK = 512
TEXTS = ("reference", "sources")


class Model:
    """SmolLM2 and its tokenizer; `config`: what its configuration is to say instead."""

    def __init__(self, **config: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = demo_dir() / "smollm2"
        self.tokens = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config).eval()

    def ids(self, name: str, length: int) -> Tensor:
        """(1, length) token ids of a text, repeated where it is shorter."""
        text = "\n".join(pydoc_data.topics.topics.values()) if name == "reference" else _sources()
        ids = self.tokens(text, return_tensors="pt", truncation=True, max_length=length).input_ids
        return ids.repeat(1, -(-length // ids.shape[1]))[:, :length]

    def hidden(self, ids: Tensor) -> Tensor:
        """(length, width): after the last norm."""
        return self.model.model(ids).last_hidden_state[0]

    def dense(self, text: str, length: int) -> Tensor:
        """`hidden` of a text with the model's own attention; kept beside the model, since every comparison asks for it."""
        path = cache_dir() / f"hidden-{demo_dir().name}-python{platform.python_version()}-{text}-{length}.pt"
        if not path.is_file():
            part = path.with_suffix(".part")
            torch.save(self.hidden(self.ids(text, length)).clone(), part)
            part.rename(path)
        return torch.load(path, weights_only=True)

    def compared(self, hidden: Tensor, dense: Tensor, ids: Tensor) -> dict[str, float]:
        """Loss difference, KL and top-1, some rows' logits at a time."""
        total, count = {"nll": 0.0, "kl": 0.0, "top1": 0.0}, ids.shape[1] - 1
        for first in range(0, count, CHUNK):
            stop = min(first + CHUNK, count)
            logits = (self.model.lm_head(x[first : stop + 1]) for x in (hidden, dense))
            found = compare_logits(*logits, ids[0, first : stop + 1])
            for name in total:
                total[name] += getattr(found, name) * (stop - first) / count
        return total


def _sources() -> str:
    return "\n".join(inspect.getsource(module) for module in (argparse, inspect))


@contextmanager
def with_attention(model: torch.nn.Module, attend: Callable[..., Tensor]) -> Iterator[None]:
    """Attention by `attend(layer, q, k, v, scale)` on (B, S, H, D)."""
    from transformers import AttentionInterface

    def call(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        return attend(module.layer_idx, *(x.transpose(1, 2) for x in (q, k, v)), scaling), None

    AttentionInterface.register("benchmark", call)
    former = model.config._attn_implementation
    model.set_attn_implementation("benchmark")
    try:
        yield
    finally:
        model.set_attn_implementation(former)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """torch's own, causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


@contextmanager
def with_recording(model: torch.nn.Module, samples: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Dense attention that keeps each layer's queries and keys."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        samples[layer] = q.clone(), k.clone()
        return dense_attention(q, k, v, scale)

    with with_attention(model, attend):
        yield

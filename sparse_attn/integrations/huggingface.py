"""transformers models that prefill sparsely and decode exactly, through transformers' own public interfaces.

    with sparse_prefill(model, AnchorConfig()) as calls:
        model.generate(ids, max_new_tokens=20)
    calls[3].density        # of layer 3's last prefill

Calls with few new rows (decoding) are dense attention. Padding, sliding windows, dropout and soft-capping are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from sparse_attn.api import anchor_attention
from sparse_attn.config import AnchorConfig
from sparse_attn.stats import Stats
from sparse_attn.tune import TunedConfig

NAME = "sparse_attn"
_ATTRIBUTE = "sparse_attn_context"


class _Context:
    def __init__(self, config: AnchorConfig | TunedConfig, exact_below: int) -> None:
        self.config, self.exact_below = config, exact_below
        self.calls: dict[int, Stats] = {}

    def of(self, layer: int) -> AnchorConfig:
        return self.config.layer(layer) if isinstance(self.config, TunedConfig) else self.config


@contextmanager
def sparse_prefill(
    model: nn.Module, config: AnchorConfig | TunedConfig | None = None, exact_below: int = 16
) -> Iterator[dict[int, Stats]]:
    """Inside the block the model's attention is `anchor_attention`; yields the stats of each layer's last prefill.

    Args:
        model: a transformers model whose causal attention goes through its AttentionInterface.
        config: one for all layers, or what `tune` found.
        exact_below: calls with fewer new rows than this use dense attention: decoding.
    """
    modules = [m for m in model.modules() if hasattr(m, "layer_idx") and getattr(m, "is_causal", False)]
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no causal attention that goes through transformers' AttentionInterface; use a "
            "model that does (Llama, Qwen2, Qwen3, SmolLM and others)"
        )
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    context = _Context(AnchorConfig() if config is None else config, exact_below)
    former = model.config._attn_implementation  # type: ignore[union-attr]
    with ExitStack() as undo:
        undo.callback(model.set_attn_implementation, former)  # type: ignore[operator]
        model.set_attn_implementation(NAME)  # type: ignore[operator]
        for module in modules:
            undo.callback(delattr, module, _ATTRIBUTE)
            setattr(module, _ATTRIBUTE, context)
        yield context.calls


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    context: _Context | None = getattr(module, _ATTRIBUTE, None)
    if context is None:
        raise ValueError('attention "sparse_attn" was called outside its block; use `with sparse_prefill(model): ...`')
    if attention_mask is not None or dropout:
        raise ValueError(
            "sparse prefill got an attention mask or dropout; it honours causal attention only: leave them out"
        )
    for name in ("sliding_window", "softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(f"sparse prefill cannot honour {name}={options[name]}; use the model's own attention")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    exact = query.shape[2] < context.exact_below
    config = AnchorConfig(theta=float("inf")) if exact else context.of(layer)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, stats = anchor_attention(q, k, v, config=config, scale=scaling, return_stats=True)
    if not exact:
        context.calls[layer] = stats
    return out, None


def _mask(*_: Any, mask_function: Any = causal_mask_function, attention_mask: Tensor | None = None, **__: Any) -> None:
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("sparse prefill got padding; prefill each prompt by itself, or pack them with cu_seqlens")
    if mask_function is not causal_mask_function:
        raise ValueError("sparse prefill honours causal attention only, and the model asks for another mask")

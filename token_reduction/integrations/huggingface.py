"""Layer policies over transformers decoders, with no patch: their modules are called, their attention is not.

    model = AutoModelForCausalLM.from_pretrained(...)
    state = prefill(blocks(model), Prompt(embeddings, positions, kinds), fastv(2, 0.25))
    logits = model.lm_head(model.model.norm(state.hidden[-1:]))
    hidden = decode(blocks(model), state, model.get_input_embeddings()(token))

Fits Llama, Qwen2, Qwen3, Mistral and others of the same layout, and the language models of Qwen2.5-VL and Qwen3-VL, whose
positions have three axes (`Prompt.positions` (3, S)) and, in Qwen3-VL, DeepStack planes (`Prompt.planes`): `blocks` takes the
whole model or its language model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DecoderBlock:
    """One decoder layer of transformers as a `Block`.

    Args:
        layer: with input_layernorm, self_attn (q_proj, k_proj, v_proj, o_proj, q_norm and k_norm where it has them),
            post_attention_layernorm and mlp (gate_proj, up_proj, down_proj, act_fn). rotary: the model's rotary embedding.
    """

    def __init__(self, layer: Any, rotary: Any) -> None:
        self.layer, self.rotary = layer, rotary
        self.axes = 3 if hasattr(rotary, "mrope_section") else 1

    def project(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Block`."""
        if positions.shape[0] != self.axes:
            raise ValueError(
                f"this decoder's rotary positions have {self.axes} axes, got {positions.shape[0]}; give positions ({self.axes}, S)"
            )
        attention, rows = self.layer.self_attn, hidden.shape[0]
        x = self.layer.input_layernorm(hidden)
        q, k, v = (
            p(x).view(rows, -1, attention.head_dim) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        turned = self.rotary(hidden[None], positions[:, None] if self.axes == 3 else positions)
        cos, sin = (part[0][:, None] for part in turned)
        return _turned(q, cos, sin), _turned(k, cos, sin), v

    def finish(self, hidden: Tensor, mixed: Tensor, share: Tensor) -> Tensor:
        """See `Block`. Rows with a share below 1 use the first units of the feed-forward only, and cost as much less."""
        hidden = hidden + self.layer.self_attn.o_proj(mixed.flatten(1))
        x, mlp, out = self.layer.post_attention_layernorm(hidden), self.layer.mlp, torch.empty_like(hidden)
        for part in share.unique().tolist():
            rows = share == part
            units = round(part * mlp.gate_proj.weight.shape[0])
            inner = mlp.act_fn(x[rows] @ mlp.gate_proj.weight[:units].T) * (x[rows] @ mlp.up_proj.weight[:units].T)
            out[rows] = inner @ mlp.down_proj.weight[:, :units].T
        return hidden + out


def blocks(model: Any) -> list[DecoderBlock]:
    """Every layer of a causal language model, or of its inner decoder.

    Raises: ValueError where its layers are laid out another way (biases in the feed-forward, sliding windows).
    """
    decoder = getattr(model, "model", model)
    decoder = getattr(decoder, "language_model", decoder)
    result = []
    for number, layer in enumerate(getattr(decoder, "layers", ())):
        lacks = [
            n for n in ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp") if not hasattr(layer, n)
        ]
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        lacks += [n for n in ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim") if not hasattr(attention, n)]
        lacks += [n for n in ("gate_proj", "up_proj", "down_proj", "act_fn") if not hasattr(mlp, n)]
        if lacks:
            raise ValueError(
                f"layer {number} is a {type(layer).__name__} without {', '.join(lacks)}; write a Block for it"
            )
        if any(getattr(mlp, n).bias is not None for n in ("gate_proj", "up_proj", "down_proj")):
            raise ValueError(
                f"layer {number} has biases in its feed-forward, which this adapter does not add; write a Block"
            )
        if getattr(attention, "sliding_window", None):
            raise ValueError(
                f"layer {number} attends in a sliding window, which this adapter does not do; write a Block"
            )
        result.append(DecoderBlock(layer, decoder.rotary_emb))
    if not result:
        raise ValueError(f"{type(model).__name__} has no decoder layers where they were looked for (model.layers)")
    return result


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin

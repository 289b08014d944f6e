"""Small mixture-of-experts models of transformers, and what a rank alone makes of a batch."""

from __future__ import annotations

import torch

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
}


def build(kind: str):
    from transformers import (
        GptOssConfig,
        GptOssForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    torch.manual_seed(0)
    if kind == "qwen3":
        own = {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **own))
    elif kind == "gpt-oss":
        own = {"num_local_experts": 8, "intermediate_size": 16, "head_dim": 8, "sliding_window": 4}
        model = GptOssForCausalLM(GptOssConfig(**SIZES, **own))
    else:
        model = MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=16, num_local_experts=8))
    draw = torch.Generator().manual_seed(1)
    for p in model.parameters():  # large weights, so that experts matter
        p.data = 0.3 * torch.randn(p.shape, generator=draw)
    return model


def batch(rank: int) -> torch.Tensor:
    return torch.randint(0, 64, (1 + rank % 2, 5 + 2 * rank), generator=torch.Generator().manual_seed(rank))


def loss_of(model, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(tokens).logits
    return logits, torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )


def compare(results: list, kind: str, shared: bool = False) -> None:
    world = len(results)
    model = build(kind)
    for rank, (logits, _) in enumerate(results):
        alone, loss = loss_of(model, batch(1 if shared else rank))
        assert torch.allclose(logits, alone, atol=2e-4, rtol=1e-3), rank
        if not shared or rank == 0:
            loss.backward()
    for name, p in model.named_parameters():
        parts = [grads[name] for _, grads in results]
        if parts[0].shape != p.shape:
            found = torch.cat(parts)
        elif shared:
            found = parts[0]
        else:
            found = sum(parts)
        scale = max(1.0, float(p.grad.abs().max()))
        assert found.shape == p.shape and torch.allclose(found, p.grad, atol=2e-4 * scale), (name, world)


def saved(folder, kind: str, width: int = 16):
    """A model and its directory: one tensor for each expert in the files, or (qwen3-vl, gpt-oss) one for all of a layer."""
    if kind != "qwen3-vl":
        model = build(kind)
    else:
        from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        own = {"num_local_experts": 8, "moe_intermediate_size": width, "head_dim": 8, "rope_parameters": rope}
        vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
        vision |= {"patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        torch.manual_seed(0)
        config = Qwen3VLMoeConfig(text_config=SIZES | own, vision_config=vision)
        model = Qwen3VLMoeForConditionalGeneration(config)
    model.generation_config.eos_token_id = 5
    model.save_pretrained(folder, max_shard_size="64KB" if kind == "qwen3" else "1GB")
    return model

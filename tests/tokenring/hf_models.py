"""Tiny random text models of transformers, and a way to run them on several ranks in one process."""

import copy

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tokenring import connect, run_local

SIZES = {
    "vocab_size": 61,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
HEADS = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "llama": lambda **k: LlamaForCausalLM(
        LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, **SIZES, **k)
    ),
    "qwen2": lambda **k: Qwen2ForCausalLM(Qwen2Config(**HEADS, **SIZES, **k)),
    "qwen3": lambda **k: Qwen3ForCausalLM(
        Qwen3Config(hidden_size=32, num_attention_heads=4, num_key_value_heads=1, head_dim=8, **SIZES, **k)
    ),
    "smollm": lambda **k: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=72, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, **SIZES, **k
        )
    ),
}
WINDOW = 6
WINDOWED = {
    "mistral": lambda **k: MistralForCausalLM(MistralConfig(sliding_window=WINDOW, **HEADS, **SIZES, **k)),
    "qwen2, every second layer": lambda **k: Qwen2ForCausalLM(
        Qwen2Config(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, **HEADS, **SIZES, **k)
    ),
    "gemma2, softcap": lambda **k: Gemma2ForCausalLM(
        Gemma2Config(sliding_window=WINDOW, head_dim=8, attn_logit_softcapping=5.0, **HEADS, **SIZES, **k)
    ),
}
"""Models with sliding windows: in every layer, in some, and together with a softcap, which only eager attention honours."""


def build(family="llama", dtype=torch.float64, **options):
    torch.manual_seed(3)
    model = {**FAMILIES, **WINDOWED}[family](**options).to(dtype).eval()
    model.set_attn_implementation("eager" if "softcap" in family else "sdpa")
    return model


def prompt(length, batch=1):
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(length))


def spread(model, world, work, *args):
    """work(group, own copy of the model, ...) on every rank, without gradients."""
    copies = [copy.deepcopy(model) for _ in range(world)]

    def on_rank(group):
        with torch.no_grad():
            return work(group, copies[connect(group).rank], *args)

    return run_local(world, on_rank)

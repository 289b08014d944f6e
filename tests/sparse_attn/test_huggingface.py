"""A transformers model prefills sparsely with one option, and decodes exactly."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_attn import AnchorConfig, TunedConfig, compare_logits
from sparse_attn.integrations.huggingface import sparse_prefill


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 50, (1, 200), generator=torch.Generator().manual_seed(1))


SPARSE = AnchorConfig(theta=1.0, block=8, step=2, dense="never")


@torch.no_grad()
def test_keeping_everything_gives_the_models_own_logits(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    expected = model(ids).logits
    with sparse_prefill(model, AnchorConfig(theta=1e9, block=8, step=2, dense="never")) as calls:
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=1e-4)
    assert [calls[layer].density for layer in (0, 1)] == [1.0, 1.0]
    torch.testing.assert_close(model(ids).logits, expected)


@torch.no_grad()
def test_a_sparse_prefill_computes_less_and_changes_little(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    dense = model(ids).logits[0]
    with sparse_prefill(model, SPARSE) as calls:
        sparse = model(ids).logits[0]
    found = compare_logits(sparse, dense, ids[0])
    assert calls[0].path == "sparse" and calls[0].density < 0.6 and 0 < found.kl < 0.1


@torch.no_grad()
def test_decoding_is_exact(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    with sparse_prefill(model, SPARSE) as calls:
        prefilled = model(ids, use_cache=True)
        before = dict(calls)
        step = model(ids[:, :1], past_key_values=prefilled.past_key_values).logits
        assert calls == before
    again = model(ids, use_cache=True).past_key_values
    for layer, kept in zip(again.layers, prefilled.past_key_values.layers):
        layer.keys, layer.values = kept.keys[:, :, :200].clone(), kept.values[:, :, :200].clone()
    torch.testing.assert_close(step, model(ids[:, :1], past_key_values=again).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_each_layer_has_its_own_thetas(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    layers = {
        0: AnchorConfig(**{**vars(SPARSE), "theta": 1e9}),
        1: AnchorConfig(**{**vars(SPARSE), "theta": (-9.0,) * 4}),
    }
    with sparse_prefill(model, TunedConfig(layers, "recall", 0.9, 0.9)) as calls:
        model(ids)
    assert calls[0].density == 1.0 and calls[1].stripe_density == 0


@torch.no_grad()
def test_padding_and_models_without_causal_attention_are_refused(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    with sparse_prefill(model, SPARSE), pytest.raises(ValueError, match="padding"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="no causal attention"), sparse_prefill(torch.nn.Linear(2, 2)):
        pass

"""A transformers model prefills sparsely with one option, and decodes exactly."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import tokenring as tr
from sparse_attn import AnchorConfig, TunedConfig, compare_logits
from sparse_attn.integrations.huggingface import sparse_prefill
from tokenring.integrations.huggingface import SpreadCache, sequence_parallel


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def peaked(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same with scores far apart, so that thetas choose."""
    sharper = copy.deepcopy(model)
    for layer in sharper.model.layers:
        layer.self_attn.q_proj.weight.data *= 300
    return sharper


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 50, (1, 200), generator=torch.Generator().manual_seed(1))


SPARSE = AnchorConfig(theta=1.0, block=8, step=2, last=4, dense="never")


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
@pytest.mark.parametrize("density", [None, 0.5])
def test_over_ranks_prompts_and_those_on_top_of_them_are_those_of_one_rank(
    peaked: LlamaForCausalLM, ids: torch.Tensor, density: float | None
) -> None:
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "do_sample": False}
    further = torch.randint(0, 50, (1, 150), generator=torch.Generator().manual_seed(2))
    second = {"input_ids": further, "position_ids": 208 + torch.arange(150)[None], "use_cache": True}
    settings = {"density": density, "keep_plans": True}
    with sparse_prefill(peaked, SPARSE, **settings) as alone:
        found = peaked.generate(ids, return_dict_in_generate=True, **options)
        first = dict(alone)
        expected = peaked(**second, past_key_values=found.past_key_values).logits

    def rank(group: tr.LocalGroup) -> tuple[torch.Tensor, torch.Tensor, dict, dict]:
        own, cache = copy.deepcopy(peaked), SpreadCache(None, group)
        with torch.no_grad(), sequence_parallel(own, group), sparse_prefill(own, SPARSE, **settings) as calls:
            written = own.generate(ids, past_key_values=cache, **options)
            before = dict(calls)
            return written, own(**second, past_key_values=cache).logits, before, dict(calls)

    results = tr.run_local(3, rank)
    assert len({calls[layer].theta for *_, calls in results for layer in (0, 1)}) == (1 if density is None else 2)
    for written, logits, before, later in results:
        assert density is not None or torch.equal(written, found.sequences)
        for calls, one in ((before, first), (later, alone)):
            assert calls[1].path == "sparse" and calls[1].bytes_sent > 0 and calls[1].plan is not None
            if density is None:
                assert calls[1].density == pytest.approx(one[1].density, rel=1e-6)
            else:
                assert 0.3 < calls[1].density < 0.8
        if density is None:
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-3)
            assert 0 < later[1].stripe_density < 1


@torch.no_grad()
def test_a_density_can_be_asked_for(peaked: LlamaForCausalLM, ids: torch.Tensor) -> None:
    with sparse_prefill(peaked, replace(SPARSE, last=0), density=0.5) as calls:
        peaked(ids)
    assert all(stats.density == pytest.approx(0.5, abs=0.1) for stats in calls.values())
    assert calls[0].theta != calls[1].theta


@torch.no_grad()
def test_given_columns_are_used_and_the_rest_is_dense(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    with sparse_prefill(model, SPARSE, keep_plans=True) as calls:
        sparse, plans = model(ids).logits, {layer: stats.plan for layer, stats in calls.items()}
    with sparse_prefill(model, plans=plans):
        torch.testing.assert_close(model(ids).logits, sparse)
    with sparse_prefill(model, plans={}) as calls:
        torch.testing.assert_close(model(ids).logits, model(ids).logits)
    assert {stats.path for stats in calls.values()} == {"dense"}


@torch.no_grad()
def test_of_a_model_that_sees_only_the_language_model_changes() -> None:
    seen, text = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 2}, {"vocab_size": 60, "num_hidden_layers": 2}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, **seen),
        text_config=LlamaConfig(**small, **text, num_key_value_heads=1),
        image_token_index=59,
    )
    torch.manual_seed(0)
    whole = LlavaForConditionalGeneration(config).eval()
    prompt = {"input_ids": torch.tensor([[1, *[59] * 4, *range(2, 50)]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    expected = whole(**prompt).logits
    with sparse_prefill(whole, AnchorConfig(theta=1e9, block=4, step=2, dense="never")) as calls:
        torch.testing.assert_close(whole(**prompt).logits, expected, atol=2e-5, rtol=1e-4)
    with sparse_prefill(whole, AnchorConfig(theta=-9.0, block=4, step=2, dense="never"), keep=range(1, 5)) as kept:
        whole(**prompt)
    assert set(calls) == set(kept) == {0, 1} and kept[0].density < 1


@torch.no_grad()
def test_windows_plans_with_settings_and_two_densities_are_refused(model: LlamaForCausalLM) -> None:
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = Qwen2Config(
        **shape, num_attention_heads=2, num_key_value_heads=1, use_sliding_window=True, max_window_layers=1
    )
    with pytest.raises(ValueError, match="sliding window"), sparse_prefill(Qwen2ForCausalLM(config)):
        pass
    with pytest.raises(ValueError, match="a plan says these itself"), sparse_prefill(model, SPARSE, plans={}):
        pass
    tuned = TunedConfig({0: SPARSE}, "recall", 0.9, 0.9)
    with pytest.raises(ValueError, match="give one of them"), sparse_prefill(model, tuned, density=0.1):
        pass


@torch.no_grad()
def test_padding_and_models_without_causal_attention_are_refused(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    with sparse_prefill(model, SPARSE), pytest.raises(ValueError, match="padding"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="no causal attention"), sparse_prefill(torch.nn.Linear(2, 2)):
        pass


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"config": {"theta": 1.0}}, "AnchorConfig"),
        ({"exact_below": -1}, "exact_below is -1"),
        ({"plans": {2: None}}, r"layers \[2\]"),
    ],
)
def test_options_that_mean_nothing_are_refused(model: LlamaForCausalLM, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said), sparse_prefill(model, **options):
        pass


@torch.no_grad()
def test_a_cache_of_fixed_length_is_refused(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    with sparse_prefill(model, SPARSE), pytest.raises(ValueError, match="DynamicCache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")


@torch.no_grad()
def test_a_block_inside_a_block_gives_way_to_it_again(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    expected = model(ids).logits
    with sparse_prefill(model, SPARSE) as outer:
        with sparse_prefill(model, AnchorConfig(theta=float("inf"))) as inner:
            torch.testing.assert_close(model(ids).logits, expected)
        assert set(inner) == {0, 1} and not outer
        model(ids)
    assert set(outer) == {0, 1}
    torch.testing.assert_close(model(ids).logits, expected, atol=0, rtol=0)

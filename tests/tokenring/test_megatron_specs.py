"""Specs: what Megatron's `--spec` finds, and the core attention put into specs of every shape."""

from __future__ import annotations

import doctest
import importlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from tests.tokenring.megatron_shim import TransformerConfig, gpt_layer_specs, multi_token_prediction, spec_utils
from tokenring.integrations.megatron import TokenRingAttention, core_attention, with_tokenring

MODULE = "tokenring.integrations.megatron"
LOCAL = {
    "gpt_layer_local_spec": (),
    "gpt_layer_local_qk_layernorm_spec": ("qk_layernorm",),
    "gpt_layer_local_mla_spec": ("multi_latent_attention",),
}
ENGINE = ("gpt_layer_te_spec", "gpt_layer_te_qk_layernorm_spec", "gpt_layer_te_mla_spec", "hybrid_stack_spec")
CONFIG = {"num_layers": 3, "hidden_size": 8, "num_attention_heads": 2, "use_cpu_initialization": True}


def core(layer):
    return layer.submodules.self_attention.submodules.core_attention


@pytest.mark.parametrize("name", LOCAL)
def test_megatrons_spec_flag_finds_ready_objects(name):
    spec = spec_utils.import_module([MODULE, name])
    assert isinstance(spec, spec_utils.ModuleSpec)
    assert core(spec).module is TokenRingAttention
    assert core(spec).params["layer_has"] == LOCAL[name]


@pytest.mark.parametrize("name", ENGINE)
def test_specs_of_transformer_engine_say_that_they_need_it(name):
    spec = spec_utils.import_module([MODULE, name])
    assert isinstance(spec, spec_utils.ModuleSpec)
    with pytest.raises(ValueError, match=r"needs transformer_engine, .* use a local spec"):
        spec_utils.build_module(spec, config=TransformerConfig(**CONFIG))


def test_the_given_spec_stays_as_it_is():
    spec = gpt_layer_specs.get_gpt_layer_local_spec(qk_layernorm=True)
    before = core(spec)
    changed = with_tokenring(spec, schedule="tokenring", backward_schedule="gather", packed_layout="sequence")
    assert core(spec) is before and before is not core(changed)
    wanted = {"schedule": "tokenring", "backward_schedule": "gather", "packed_layout": "sequence"}
    assert core(changed).params == core_attention().params | wanted
    assert changed.submodules.mlp is spec.submodules.mlp and changed.module is spec.module
    assert core(with_tokenring(changed)).params["schedule"] is None


def test_every_layer_of_a_block_dense_and_moe_and_of_multi_token_prediction():
    config = TransformerConfig(**CONFIG, num_moe_experts=4, moe_layer_freq=[0, 1, 1])
    block = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False, pp_rank=0)
    changed = with_tokenring(block)
    assert [core(layer).module for layer in changed.layer_specs] == [TokenRingAttention] * 3
    prediction = with_tokenring(multi_token_prediction.get_mtp_layer_spec(block.layer_specs[-1], False)).submodules
    inner = getattr(prediction, "mtp_model_layer", None) or prediction.transformer_layer
    assert core(inner).module is TokenRingAttention


class TEDotProductAttention:
    """Transformer Engine's by its name alone."""


class DSAttention:
    """An attention that is not a dot product over all keys."""


@dataclass
class Attention:
    core_attention: Any
    linear_qkv: Any = None


@dataclass
class Stack:
    attention_layer: Any
    sparse_layer: Any
    mlp_layer: Any


def test_a_hybrid_stack_keeps_its_other_layers():
    sparse = spec_utils.ModuleSpec(DSAttention)
    mlp = partial(dict, submodules=Attention(spec_utils.ModuleSpec(TEDotProductAttention)))
    stack = spec_utils.ModuleSpec(Stack, submodules=Stack([Attention(TEDotProductAttention)], Attention(sparse), mlp))
    changed = with_tokenring(stack).submodules
    assert changed.attention_layer[0].core_attention == core_attention()
    assert changed.sparse_layer.core_attention == sparse
    assert changed.mlp_layer.keywords["submodules"].core_attention == core_attention()


@pytest.mark.parametrize("nothing", [None, spec_utils.ModuleSpec(DSAttention), Attention(DSAttention), lambda: None])
def test_a_spec_without_dot_product_attention(nothing):
    with pytest.raises(ValueError, match="holds no DotProductAttention or TEDotProductAttention to replace"):
        with_tokenring(nothing)


@pytest.mark.parametrize("name", ["", "_attention", "_checks", "_packing"])
def test_docstring_examples_run(name):
    assert doctest.testmod(importlib.import_module(MODULE + name)).failed == 0

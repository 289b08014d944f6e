"""Layer policies over real decoder classes of transformers, against the classes' own forward."""

from __future__ import annotations

import pytest
import torch

from tests.launch import tiny_models
from token_reduction.inside import SYSTEM, TEXT, VISUAL, Prompt, Yopo, decode, fastv, prefill, vtw
from token_reduction.integrations.huggingface import blocks

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}


def tiny(family: str):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval().double()


def prompt_of(model, ids: torch.Tensor) -> Prompt:
    kinds = torch.tensor([TEXT] * 2 + [VISUAL] * 12 + [TEXT] * 4)
    return Prompt(model.get_input_embeddings()(ids).detach(), torch.arange(18)[None], kinds)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
@torch.no_grad()
def test_without_a_policy_prefill_and_decoding_are_the_models_own(family):
    model, ids = tiny(family), torch.arange(18) * 7 % 50
    state = prefill(blocks(model), prompt_of(model, ids))
    more = torch.tensor([3, 8])
    got = [model.lm_head(model.model.norm(state.hidden))]
    for token in more:
        got.append(
            model.lm_head(model.model.norm(decode(blocks(model), state, model.get_input_embeddings()(token[None]))))
        )
    expected = model(torch.cat([ids, more])[None]).logits[0]
    torch.testing.assert_close(torch.cat(got), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", ["qwen25", "qwen3"])
@torch.no_grad()
def test_mrope_and_deepstack_decoders_equal_their_own_forward(family, tmp_path):
    """The whole prompt with three position axes (and planes), then two rows at the next position on every axis."""
    import transformers

    maker, cls = {
        "qwen25": (tiny_models.qwen25, "Qwen2_5_VLForConditionalGeneration"),
        "qwen3": (tiny_models.qwen3, "Qwen3VLForConditionalGeneration"),
    }[family]
    model = getattr(transformers, cls).from_pretrained(maker(tmp_path), dtype=torch.float64).eval()
    decoder, g = model.model.language_model, torch.Generator().manual_seed(0)
    width, visual = decoder.config.hidden_size, 12
    kinds = torch.tensor([SYSTEM] * 3 + [VISUAL] * visual + [TEXT] * 5)
    hidden = torch.randn(20, width, generator=g, dtype=torch.float64)
    places = torch.arange(visual)
    positions = torch.arange(20).repeat(3, 1)
    positions[:, 3:15] = 3 + torch.stack([places // 6, places % 6 // 3, places % 3])
    positions[:, 15:] = torch.arange(5) + 6
    planes = torch.randn(visual, 2, width, generator=g, dtype=torch.float64) if family == "qwen3" else None
    state = prefill(blocks(model), Prompt(hidden, positions, kinds, planes=planes))
    steps = torch.randn(2, width, generator=g, dtype=torch.float64)
    got = torch.cat([decoder.norm(state.hidden), *(decoder.norm(decode(blocks(model), state, s[None])) for s in steps)])
    deep = {} if planes is None else {
        "visual_pos_masks": torch.cat([kinds == VISUAL, torch.zeros(2, dtype=torch.bool)])[None],
        "deepstack_visual_embeds": list(planes.unbind(1)),
    }  # fmt: skip
    where = torch.cat([positions, torch.tensor([11, 12]).repeat(3, 1)], 1)
    whole = torch.cat([hidden, steps])[None]
    mask = torch.ones(1, 22, dtype=torch.bool)
    expected = decoder(inputs_embeds=whole, position_ids=where[:, None], attention_mask=mask, **deep).last_hidden_state
    torch.testing.assert_close(got, expected[0], atol=1e-5, rtol=1e-5)
    shed = prefill(blocks(model), Prompt(hidden, positions, kinds, planes=planes), fastv(0, 0.25))
    assert [len(cache.rows) for cache in shed.caches] == [20, *[11] * (len(shed.caches) - 1)]
    assert shed.next_position.tolist() == [[11]] * 3


@torch.no_grad()
def test_rows_that_left_are_masked_keys_of_later_layers():
    """VTW at the second layer: text rows of the first layer see everything, later ones only text."""
    model, ids = tiny("Llama"), torch.arange(18) * 7 % 50
    p = prompt_of(model, ids)
    state = prefill(blocks(model), p, vtw(1))
    first = prefill(blocks(model)[:1], p)
    text = (p.kinds == TEXT).nonzero()[:, 0]
    later = prefill(blocks(model)[1:], Prompt(first.hidden[text], p.positions[:, text], p.kinds[text]))
    torch.testing.assert_close(state.hidden, later.hidden)
    assert [len(c.rows) for c in state.caches] == [18, 6, 6]
    assert int(state.next_position) == 18
    some = prefill(blocks(model), p, fastv(0, 0.25))
    assert [len(c.rows) for c in some.caches] == [18, 9, 9]


@torch.no_grad()
def test_a_narrow_feed_forward_uses_the_first_units_only():
    model, ids = tiny("Llama"), torch.arange(18) * 7 % 50
    p = prompt_of(model, ids)
    state = prefill(blocks(model), p, None, Yopo(ffn=0.5))
    for layer in model.model.layers:
        layer.mlp.forward = narrowed(layer.mlp, p.kinds == VISUAL)
    torch.testing.assert_close(model.lm_head(model.model.norm(state.hidden)), model(ids[None]).logits[0])


def narrowed(mlp, visual: torch.Tensor):
    def forward(x: torch.Tensor) -> torch.Tensor:
        inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        inner[:, visual, 24:] = 0
        return mlp.down_proj(inner)

    return forward


def test_decoders_of_another_layout_are_refused():
    import transformers

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    with pytest.raises(ValueError, match="no decoder layers"):
        blocks(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))
    model = tiny("Llama")
    with pytest.raises(ValueError, match="have 1 axes, got 3"):
        blocks(model)[0].project(torch.zeros(2, 32, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.int64))
    model.model.layers[1].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(48))
    with pytest.raises(ValueError, match="layer 1 has biases"):
        blocks(model)

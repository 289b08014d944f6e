"""What `sequence_parallel` leaves behind (nothing) and what it refuses (all it cannot honour)."""

import copy

import pytest
import torch
from transformers import (
    AttentionInterface,
    DynamicCache,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.masking_utils import and_masks, causal_mask_function, chunked_overlay, sliding_window_overlay

from tests.tokenring.hf_models import build, prompt, spread
from tokenring import Layout, Mask, connect, run_local
from tokenring.integrations.hf_checks import mask_of
from tokenring.integrations.huggingface import SpreadCache, register, sequence_parallel

FOUR_ROWS = Layout.contiguous(4, 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nothing_is_left_behind_even_after_an_exception(implementation):
    model = build()
    model.set_attn_implementation(implementation)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError), sequence_parallel(model, None, Layout.contiguous(4, 1)):
        assert model.config._attn_implementation == "tokenring"
        assert hasattr(model.model.layers[0].self_attn, "tokenring_context")
        raise ZeroDivisionError
    assert model.config._attn_implementation == implementation
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_register_can_be_called_again():
    register()
    first = AttentionInterface._global_mapping["tokenring"]
    register()
    assert AttentionInterface._global_mapping["tokenring"] is first


def test_the_attention_without_a_context_says_what_to_do():
    register()
    model = build()
    model.set_attn_implementation("tokenring")
    with pytest.raises(ValueError, match=r"outside .*sequence_parallel\(model, group, layout\)"):
        model(input_ids=prompt(4))


FOUR = torch.arange(4)[None]
CALLS = {
    "padding": ({"attention_mask": torch.tensor([[0, 1, 1, 1]])}, "zeros \\(padding\\)"),
    "four-d mask": ({"attention_mask": torch.zeros(1, 1, 4, 4)}, r"attention_mask is \(1, 1, 4, 4\)"),
    "mask mapping": ({"attention_mask": {"full_attention": None}}, "attention_mask is dict"),
    "attention maps": ({"output_attentions": True}, "output_attentions cannot be honoured"),
    "packed": ({"position_ids": torch.tensor([[0, 1, 0, 1]])}, "packed documents"),
    "packed later": ({"position_ids": torch.tensor([[1, 2, 3, 0]])}, "packed documents"),
    "no positions": ({"position_ids": None}, "position_ids is missing"),
    "short positions": ({"position_ids": torch.arange(3)[None]}, "3 entries for 4 rows"),
    "wrong rows": ({"input_ids": torch.ones(1, 3, dtype=torch.long)}, "got 3 rows; the layout gives it 4"),
    "foreign cache": ({"past_key_values": DynamicCache()}, "is a DynamicCache"),
    "other layout": (
        {"past_key_values": SpreadCache(Layout.contiguous(5, 1), None)},
        "made for another layout or group",
    ),
    "cache asked for": ({"use_cache": True}, "use_cache=True needs past_key_values"),
    "labels": ({"labels": torch.ones(1, 4, dtype=torch.long)}, "shard_labels"),
    "packed lengths": (
        {"cu_seq_lens_q": torch.tensor([0, 2, 4]), "cu_seq_lens_k": torch.tensor([0, 2, 4])},
        "does not know cu_seq_lens_k",
    ),
    "position bias": ({"position_bias": torch.zeros(1, 4, 4, 4)}, "does not know position_bias"),
    "bidirectional": ({"is_causal": False}, "is_causal=False|other than plain causal"),
    "unknown": ({"temperature_of_attention": 2.0}, "does not know temperature_of_attention=2.0"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_cannot_be_honoured_is_refused(case):
    changes, message = CALLS[case]
    model = build()
    call = {"input_ids": torch.ones(1, 4, dtype=torch.long), "position_ids": FOUR, **changes}
    with (
        torch.no_grad(),
        sequence_parallel(model, None, Layout.contiguous(4, 1)),
        pytest.raises(ValueError, match=message) as refusal,
    ):
        model(**call)
    assert "\n" not in str(refusal.value)


def test_packed_documents_that_start_again_on_the_next_rank_are_refused():
    model, layout = build(), Layout.contiguous(8, 2)

    def work(group, model):
        with sequence_parallel(model, group, layout), pytest.raises(ValueError, match="packed documents"):
            rank = connect(group).rank
            if rank == 0:
                raise ValueError("packed documents")  # rank 0 sees nothing wrong and would wait for rank 1
            model(input_ids=prompt(4), position_ids=FOUR)

    spread(model, 2, work)


def test_a_mask_of_ones_is_honoured():
    model, ids = build(), prompt(4)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with sequence_parallel(model, None, Layout.contiguous(4, 1)):
            got = model(ids, torch.ones(1, 4, dtype=torch.long), FOUR).logits  # positional arguments too
    assert (got - expected).abs().max() < 1e-10


def test_dropout_in_training_is_refused():
    model = build(attention_dropout=0.1).train()
    with sequence_parallel(model, None, Layout.contiguous(4, 1)), pytest.raises(ValueError, match=r"dropout 0\.1"):
        model(input_ids=prompt(4), position_ids=FOUR)


def test_layers_of_other_kinds_are_refused():
    model = build()
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with (
        pytest.raises(ValueError, match="has chunked_attention layers"),
        sequence_parallel(model, None, Layout.contiguous(4, 1)),
    ):
        pass


def test_only_causal_masks_and_windows_of_the_span_that_is_named_are_taken():
    window = and_masks(sliding_window_overlay(5), causal_mask_function)
    assert mask_of(causal_mask_function, None, True) is None
    assert mask_of(window, 5, True) == Mask.window(4)
    assert mask_of(and_masks(sliding_window_overlay(1), causal_mask_function), 1, True) == Mask.window(0)
    blocks = and_masks(chunked_overlay(5, torch.zeros(1, dtype=torch.long)), causal_mask_function)
    both_ways = sliding_window_overlay(5)
    cases = ((window, 4, True), (window, 6, True), (window, None, True), (window, 5, False), (blocks, 5, True))
    for asked, span, plain in (*cases, (both_ways, 5, True), (causal_mask_function, None, False)):
        with pytest.raises(ValueError, match="other than plain causal or a sliding window"):
            mask_of(asked, span, plain)


def test_a_window_that_only_some_speak_of_is_refused():
    model = build("mistral")
    rows = torch.ones(1, 4, 4, 8, dtype=torch.float64)
    with torch.no_grad(), sequence_parallel(model, None, Layout.contiguous(4, 1)):
        attend = AttentionInterface._global_mapping["tokenring"]
        with pytest.raises(ValueError, match="attention is called with a sliding window of 6 and the model's mask"):
            attend(model.model.layers[0].self_attn, rows, rows, rows, None, sliding_window=6)
        model.config.sliding_window = 3
        with pytest.raises(ValueError, match="the cache keeps rows with a sliding window of 6"):
            model(input_ids=prompt(4), position_ids=FOUR, past_key_values=SpreadCache(None, None))


def test_models_and_layouts_that_cannot_be_spread_are_refused():
    tower = SiglipVisionModel(
        SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="no causal attention module"), sequence_parallel(tower, None, FOUR_ROWS):
        pass
    model = build()
    with pytest.raises(ValueError, match=r"give a tokenring\.Layout"), sequence_parallel(model, None, "zigzag"):
        pass
    with pytest.raises(ValueError, match="for 2 ranks and the group has 1"):
        sequence_parallel(model, None, Layout.zigzag(4, 2)).__enter__()
    with sequence_parallel(model, None, FOUR_ROWS), pytest.raises(ValueError, match="already inside"):
        sequence_parallel(model, None, FOUR_ROWS).__enter__()

    def empty(group):
        with pytest.raises(ValueError, match="gives none to rank 2"):
            sequence_parallel(copy.deepcopy(model), group, Layout.contiguous(2, 3)).__enter__()

    run_local(3, empty)

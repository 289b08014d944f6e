"""What the Megatron core attention cannot honour is refused with the reason, and on every rank of the group."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import random_qkv
from tests.tokenring.megatron_dense import build, params, sbhd
from tests.tokenring.megatron_shim import AttnBackend, AttnMaskType, PackedSeqParams, TransformerConfig, spec_utils
from tokenring import AgreementError, connect, run_local
from tokenring.integrations.megatron import core_attention
from tokenring.integrations.megatron_checks import check_config
from tokenring.transport.inprocess import LocalWorld


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1 .*--attention-dropout 0"),
        ({"qk_clip": True}, "qk_clip asks for the largest attention logit"),
        ({"log_max_attention_logit": True}, "log_max_attention_logit asks for"),
        ({"fp8_dot_product_attention": True}, "fp8_dot_product_attention asks for attention in 8 bits"),
        ({"mask_type": "arbitrary"}, "attn_mask_type arbitrary cannot be honoured"),
        ({"window_size": (-2, 0)}, r"window_size is \(-2, 0\)"),
        ({"packed_layout": "rows"}, "packed_layout is 'rows'; give one of documents, sequence"),
        ({"cp_comm_type": ["p2p"]}, "one layer takes one name"),
        ({"cp_comm_type": "a2a+p2p"}, "needs two hierarchical context parallel groups"),
        ({"layer_has": (), "qk_layernorm": True}, "sets qk_layernorm and this ready spec was built without it"),
        ({"layer_has": ("qk_layernorm",)}, "does not set qk_layernorm and this ready spec was built with it"),
        ({"context_parallel_size": 2}, "context_parallel_size is 2 and pg_collection has no cp group"),
    ],
)
def test_when_the_layer_is_built(options, said):
    with pytest.raises(ValueError, match=said):
        build(None, **options)


def test_at_construction_with_one_string_as_megatron_raises_it_again():
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1 .* when instantiating TokenRingAttention"):
        spec_utils.build_module(
            core_attention(), config=config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self"
        )


def test_a_kernel_choice_that_changes_nothing_is_said_so():
    with pytest.warns(UserWarning, match="attention_backend flash .* changes nothing here"):
        build(None, attention_backend=AttnBackend.flash)


def case(rows=8, keys=None, thd=False, **call):
    """Arguments of one call on each of two ranks."""
    q, k, v = random_qkv(1, rows, 6, 2, 4, torch.float64, kv_length=keys)
    enter = (lambda x: x[0]) if thd else sbhd
    return [enter(x) for x in (q, k, v)], {"attention_mask": None, **call}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: case(attention_bias=torch.zeros(1, 6, 8, 16)), r"attention_bias \(1, 6, 8, 16\) cannot be honoured"),
        (lambda: case(rows=7), "each of 2 ranks holds 7 rows; .* pad it to a multiple of 4"),
        (lambda: case(rows=4, keys=8), "4 rows of queries and 8 of keys on each of 2 ranks"),
        (lambda: case(attention_mask=torch.zeros(1, 1, 8, 8).bool()), r"give None, or bools \(b, 1, 8, 16\)"),
        (lambda: case(attention_mask=torch.zeros(3, 1, 8, 16).bool()), r"attention_mask is \(3, 1, 8, 16\)"),
        (lambda: case(attention_mask=torch.zeros(1, 1, 8, 16)), "attention_mask is .* torch.float32"),
        (lambda: case(attention_mask=torch.zeros(1, 1, 8, 16).bool()), "differs from what attn_mask_type causal says"),
        (lambda: case(packed_seq_params=params([0, 16], None)), r"qkv_format thd is \(t, heads, head dim\)"),
        (lambda: case(thd=True), r"qkv_format sbhd is \(s, b, heads, head dim\)"),
        (lambda: case(packed_seq_params=PackedSeqParams(qkv_format="bshd")), "qkv_format is 'bshd'; give sbhd or thd"),
        (lambda: case(thd=True, packed_seq_params=PackedSeqParams(qkv_format="thd")), "has no cu_seqlens_q"),
        (lambda: case(thd=True, packed_seq_params=params([0, 5, 16], None)), "a packed document has 5 rows"),
        (
            lambda: case(thd=True, packed_seq_params=params([0, 16], None), attention_mask=torch.ones(1, 1, 8, 16)),
            r"attention_mask is \(1, 1, 8, 16\) beside packed documents",
        ),
        (lambda: case(thd=True, packed_seq_params=params([0, 8, 12], None)), "end at row 12 and the 2 ranks hold 16"),
        (lambda: case(thd=True, packed_seq_params=params([0, 8, 20], None)), "end at row 20 and the 2 ranks hold 16"),
        (
            lambda: case(thd=True, packed_seq_params=params([0, 9, 16], [0, 8, 16])),
            "every document fit into its padded",
        ),
        (lambda: case(thd=True, packed_seq_params=params([0, 9, 4], None)), "never fall"),
        (
            lambda: case(thd=True, packed_seq_params=params([0, 16], None, [0, 8, 16])),
            "cu_seqlens_q names 1 documents and cu_seqlens_kv 2",
        ),
        (
            lambda: case(packed_seq_params=PackedSeqParams("sbhd", torch.tensor([0, 9, 16]))),
            r"format sbhd has cu_seqlens_q \[0, 9, 16\] and the batch is 1 rows of 16",
        ),
        (
            lambda: case(packed_seq_params=PackedSeqParams("sbhd", torch.zeros(2, 3))),
            r"cu_seqlens_q is \(2, 3\) torch.float32; give an int",
        ),
    ],
)
def test_in_a_call_on_the_other_ranks_too(make, said):
    """Rank 1 is given what cannot be honoured; rank 0 a good call, and is told instead of waiting."""

    def call(group):
        bad = connect(group).rank == 1
        args, kwargs = make() if bad else case()
        attention = build(group)
        with pytest.raises(
            ValueError if bad else AgreementError, match=said if bad else "rank 1 of 2 refused this call"
        ):
            attention(*args, **kwargs)
        good, kwargs = case()
        return attention(*good, **kwargs).shape

    assert run_local(2, call) == [(8, 1, 24)] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"local_cp_size": 2}, "local_cp_size 2 and no cp_group"),
        ({"local_cp_size": 4, "cp_group": LocalWorld(2).groups()[0]}, "local_cp_size 4 and a cp_group of 2 ranks"),
    ],
)
def test_a_group_for_one_call_that_contradicts_its_size(options, said):
    args, _ = case()
    with pytest.raises(ValueError, match=said):
        build(None)(*args, None, packed_seq_params=PackedSeqParams("sbhd", **options))


def test_padding_in_the_middle_of_a_row():
    args, _ = case()
    mask = torch.tensor([False, True] + [False] * 6)[None, None, None]
    with pytest.raises(ValueError, match="only the last keys of a row can be padding"):
        build(None, mask_type="padding")(*args, mask)


def test_sums_that_must_not_depend_on_the_batch():
    class Config:
        batch_invariant_mode = True

    with pytest.raises(ValueError, match="batch_invariant_mode asks for sums whose order"):
        check_config(Config, 0.0, "documents", None)

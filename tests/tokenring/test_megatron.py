"""A GPT model of Megatron-Core over context and tensor parallel ranks equals Megatron's own attention on one rank."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.tokenring.megatron_dense import packing, params, partition
from tests.tokenring.megatron_shim import (
    GPTModel,
    MLATransformerConfig,
    PackedSeqParams,
    TransformerConfig,
    gpt_layer_specs,
    megatron_on_cpu,
    model_parallel,
    own_cut,
    parallel_state,
)
from tokenring.integrations.megatron import with_tokenring

BATCH, LENGTH, VOCAB = 2, 48, 64
PLAIN = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
LATENT = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "multi_latent_attention": True}
LATENT |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 6}
LATENT |= {"rope_type": "rope", "rotary_scaling_factor": 1}


def build(spec, dtype, **options):
    """The same weights on any number of tensor parallel ranks: Megatron cuts what one seed draws."""
    latent = options.get("multi_latent_attention")
    torch.manual_seed(1)
    config = (MLATransformerConfig if latent else TransformerConfig)(
        **{**({} if latent else PLAIN), "attention_dropout": 0.0, "hidden_dropout": 0.0, **options},
        bias_dropout_fusion=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
    )
    gathered = dtype == torch.float64  # for the loss in float64, which Megatron's own is not
    return GPTModel(config, spec, VOCAB, LENGTH, parallel_output=not gathered, position_embedding_type="rope").to(dtype)


def data(number):
    """One batch (B, S) of its own for each `number`; a fifth of the labels are not counted."""
    make = torch.Generator().manual_seed(100 + number)
    tokens, labels = (torch.randint(0, VOCAB, (BATCH, LENGTH), generator=make) for _ in range(2))
    counted = torch.rand(BATCH, LENGTH, generator=make) > 0.2
    return {"tokens": tokens, "labels": labels, "counted": counted}


def loss_of(model, batch, mask=None, packed=None):
    """Summed over the counted tokens given; float32 through Megatron's own loss, float64 from the logits."""
    tokens, labels = batch["tokens"], batch["labels"]
    if next(model.parameters()).dtype == torch.float32:
        losses = model(tokens, None, mask, labels=labels, packed_seq_params=packed)
    else:
        logits = model(tokens, None, mask, packed_seq_params=packed)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (losses * batch["counted"]).sum()


def results(model, loss, group=None):
    """Loss and gradients, summed over the context parallel group, and each parameter's dim cut by tensor parallelism."""
    loss.backward()
    found = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
    if group is not None:
        for value in found.values():
            dist.all_reduce(value, group=group)
    cut = {n: p.partition_dim for n, p in model.named_parameters() if getattr(p, "tensor_model_parallel", False)}
    return found, cut


def worst(found, cut, expected):
    """The largest difference to one rank's results, relative to the largest entry of each."""
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    errors = {}
    for name, value in expected.items():
        mine = value.chunk(tp, cut[name])[rank] if name in cut else value
        errors[name] = float((found[name] - mine).abs().max() / value.abs().max().clamp_min(1e-30))
    assert found.keys() == expected.keys() and len(errors) > 10
    return max(errors.items(), key=lambda item: item[1])


def alone(dtype, number, options, latent=False):
    """Megatron's own attention with a mask tensor on one rank; its latent attention has none for CPUs, so ours on one rank."""
    spec = gpt_layer_specs.get_gpt_layer_local_spec(multi_latent_attention=latent)
    model = build(with_tokenring(spec, kernel="reference") if latent else spec, dtype, **options)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    return results(model, loss_of(model, data(number), mask))[0]


def train(group, tp, cp, dtype, options, extra, own):
    """The worst error of this rank, which shares its batch with its context and tensor parallel peers."""
    latent = options.get("multi_latent_attention", False)
    spec = with_tokenring(gpt_layer_specs.get_gpt_layer_local_spec(multi_latent_attention=latent), **own)
    number = group.rank() // (tp * cp)
    with megatron_on_cpu():
        with model_parallel(group):
            expected = alone(dtype, number, options, latent)
        with model_parallel(group, tensor_model_parallel_size=tp, context_parallel_size=cp):
            assert parallel_state.get_data_parallel_rank() == number
            cp_group = parallel_state.get_context_parallel_group()
            model = build(spec, dtype, **options, **extra)
            loss = loss_of(model, own_cut(data(number), cp_group))
            return worst(*results(model, loss, cp_group), expected)


@pytest.mark.parametrize(("world", "tp", "cp"), [(4, 1, 2), (4, 2, 2), (3, 1, 3), (4, 1, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradients_equal_one_rank(pool, world, tp, cp, dtype, tolerance):
    for name, error in pool.run(world, train, tp, cp, dtype, {}, {}, {}):
        assert error < tolerance, name


CASES = {
    "selective recompute": ({}, {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}, {}),
    "full recompute": (
        {},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"schedule": "tokenring"},
    ),
    "one key head for two tensor parallel ranks": ({"num_query_groups": 1}, {}, {"schedule": "gather"}),
    "learned sinks": ({"softmax_type": "learnable"}, {}, {}),
    "all-to-all": ({}, {"cp_comm_type": "a2a"}, {}),
    "latent attention": (LATENT, {"cp_comm_type": "p2p"}, {}),
    "float16-safe scaling by the layer's number": ({"apply_query_key_layer_scaling": True}, {}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_options_of_the_config_change_nothing_between_ranks(pool, name):
    tp = (
        1 if name == "latent attention" else 2
    )  # Megatron's own local latent attention sums no rope gradient over heads
    for worst_name, error in pool.run(4, train, tp, 2, torch.float64, *CASES[name]):
        assert error < 1e-12, worst_name


def documents():
    """Packed documents of their own lengths, their tokens and labels: what packing must not change."""
    make = torch.Generator().manual_seed(7)
    return [torch.randint(0, VOCAB, (2, n), generator=make) for n in (9, 4, 21, 2)]


def train_packed(group, options):
    """Documents packed and cut as Transformer Engine cuts them, against each document run alone."""
    latent = options.get("multi_latent_attention", False)
    spec = gpt_layer_specs.get_gpt_layer_local_spec(multi_latent_attention=latent)
    tp = 1 if latent else 2
    with megatron_on_cpu():
        with model_parallel(group):
            model = build(with_tokenring(spec) if latent else spec, torch.float64, **options)
            loss = torch.zeros((), dtype=torch.float64)
            for tokens, labels in documents():
                mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)[None, None]
                one = {"tokens": tokens[None], "labels": labels[None], "counted": torch.ones(1, len(tokens))}
                loss = loss + loss_of(model, one, mask)
            expected = results(model, loss)[0]
        with model_parallel(group, tensor_model_parallel_size=tp, context_parallel_size=2):
            cp_group = parallel_state.get_context_parallel_group()
            cu, padded, rows = packing([doc.shape[1] for doc in documents()], 2, spare=1)
            stream = {"tokens": torch.full((1, padded[-1]), 5), "labels": torch.full((1, padded[-1]), 3)}
            stream["counted"] = torch.zeros(1, padded[-1])
            for (tokens, labels), at in zip(documents(), rows):
                stream["tokens"][0, at], stream["labels"][0, at], stream["counted"][0, at] = tokens, labels, 1.0
            mine = partition(padded, 2, cp_group.rank())
            model = build(with_tokenring(spec), torch.float64, **options)
            loss = loss_of(model, {n: x[:, mine] for n, x in stream.items()}, packed=params(cu, padded))
            return worst(*results(model, loss, cp_group), expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}, LATENT],
    ids=["plain", "recompute", "latent"],
)
def test_packed_documents_equal_each_document_alone(pool, options):
    for name, error in pool.run(4, train_packed, options):
        assert error < 1e-12, name


def train_dynamic(group):
    """Two micro-batches on one model built without context parallelism: on pairs of ranks, and on no group."""
    spec = gpt_layer_specs.get_gpt_layer_local_spec()
    rank, errors = group.rank(), []
    with megatron_on_cpu(), model_parallel(group):
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        for number, size, own in ((rank // 2, 2, pairs[rank // 2]), (rank, 1, None)):
            expected = alone(torch.float64, number, {})
            packed = PackedSeqParams(
                "sbhd", max_seqlen_q=LENGTH, max_seqlen_kv=LENGTH, local_cp_size=size, cp_group=own
            )
            model = build(with_tokenring(spec), torch.float64)
            batch = data(number) if own is None else own_cut(data(number), own)
            errors.append(worst(*results(model, loss_of(model, batch, packed=packed), own), expected))
        for pair in pairs:
            if pair is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(pair)
    return errors


def test_a_group_for_each_micro_batch(pool):
    for name, error in chain.from_iterable(pool.run(4, train_dynamic)):
        assert error < 1e-12, name


def saved(group):
    """Keys, whole shape and this rank's place of a core attention's parameters in a distributed checkpoint."""
    with megatron_on_cpu(), model_parallel(group, tensor_model_parallel_size=2, context_parallel_size=2):
        model = build(
            with_tokenring(gpt_layer_specs.get_gpt_layer_local_spec()), torch.float32, softmax_type="learnable"
        )
        metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        core = model.decoder.layers[0].self_attention.core_attention
        return [
            (name, tuple(x.global_shape), tuple(x.global_offset))
            for name, x in core.sharded_state_dict("core.", metadata=metadata).items()
        ]


def test_learned_sinks_are_saved_under_megatrons_name(pool):
    for rank, found in enumerate(pool.run(4, saved)):
        assert found == [("core.softmax_offset", (4,), (2 * (rank % 2),))]

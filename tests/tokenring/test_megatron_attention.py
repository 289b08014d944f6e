"""Megatron's core attention module on in-process ranks equals dense attention: masks, windows, sinks, schedules."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import dense_attention, random_qkv
from tests.tokenring.megatron_dense import SIZES, assert_dense, build, sbhd, together
from tests.tokenring.megatron_shim import AttnMaskType, ProcessGroupCollection, TransformerConfig
from tokenring import AttentionShape, Layout, Mask, connect, count_traffic, plan, run_local
from tokenring.integrations.megatron import TokenRingAttention
from tokenring.transport.inprocess import LocalWorld


@pytest.mark.parametrize(
    ("mask_type", "window", "meant"),
    [
        ("causal", None, Mask.causal()),
        ("causal_bottom_right", None, Mask.causal()),
        ("no_mask", None, Mask.full()),
        ("padding", None, Mask.full()),
        ("causal", (5, 0), Mask.window(5)),
        ("causal", (5, 3), Mask.window(5)),
        ("no_mask", (3, 6), Mask.window(3, 6)),
        ("no_mask", (-1, 2), Mask.window(99, 2)),
        ("padding_causal", (-1, -1), Mask.causal()),
    ],
)
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_a_sequence_in_megatrons_zigzag_equals_dense_attention(world, mask_type, window, meant):
    length = 4 * world * 2
    qkv, at = random_qkv(2, length, 6, 2, 4, torch.float64, v_dim=3, seed=world), torch.arange(length)
    assert_dense(world, qkv, meant.dense(at, at), Layout.zigzag(length, world), mask_type=mask_type, window_size=window)


@pytest.mark.parametrize("own", [{"softmax_scale": 0.7}, {"kernel": "reference"}])
def test_options_reach_the_attention(own):
    qkv, at = random_qkv(2, 12, 6, 2, 4, torch.float64), torch.arange(12)
    assert_dense(3, qkv, Mask.causal().dense(at, at), Layout.zigzag(12, 3), schedule="tokenring", **own)
    with pytest.raises(ValueError, match="'no such'"):
        assert_dense(1, qkv, Mask.causal().dense(at, at), Layout.zigzag(12, 1), kernel="no such")


def test_only_the_layers_that_window_attn_skip_freq_names_are_windowed():
    config = {"window_size": (4, 0), "window_attn_skip_freq": [0], "num_layers": 1}
    assert build(None, **config).window is None
    assert build(None, **config | {"window_attn_skip_freq": [1]}).window == (4, 0)


@pytest.mark.parametrize(("mask_type", "rows"), [("no_mask", 1), ("causal", 1), ("causal_bottom_right", 3)])
def test_new_tokens_against_a_cache_on_one_rank(mask_type, rows):
    qkv = random_qkv(2, rows, 6, 2, 4, torch.float64, kv_length=9)
    allowed = Mask.window(4).dense(torch.arange(9 - rows, 9), torch.arange(9))
    cuts = (Layout.contiguous(rows, 1), Layout.contiguous(9, 1))
    assert_dense(1, qkv, allowed, *cuts, mask_type=mask_type, window_size=(4, 0))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_mask_tensors_that_say_what_the_type_says_are_accepted(world):
    length = 4 * world
    qkv, at = random_qkv(2, length, 6, 2, 4, torch.float64), torch.arange(length)
    cut = Layout.zigzag(length, world)
    for mask_type, meant in (("causal", Mask.causal()), ("no_mask", Mask.full())):
        allowed = meant.dense(at, at)

        def call(group, mask_type=mask_type, allowed=allowed):
            rank = connect(group).rank
            mask, module = ~allowed[None, None][:, :, cut.positions(rank)], build(group, mask_type=mask_type)
            local = [sbhd(cut.shard(x, rank)) for x in qkv]
            out = module(*local, mask)
            assert torch.equal(out, module(*local, mask))
            mask[0, 0, -1, 0] ^= True
            with pytest.raises(ValueError, match=f"differs from what attn_mask_type {mask_type} says"):
                module(*local, mask)
            return out.unflatten(-1, (6, 4)).transpose(0, 1)

        expected, _ = dense_attention(*qkv, allowed)
        assert (together(run_local(world, call), cut) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("mask_type", "band"), [("padding", Mask.full()), ("padding_causal", Mask.causal())])
@pytest.mark.parametrize("same_in_every_row", [False, True])
def test_padding_at_the_end_of_each_row_is_never_attended_to(world, mask_type, band, same_in_every_row):
    at, lengths = torch.arange(8), (5, 8)
    qkv, cut = random_qkv(2, 8, 6, 2, 4, torch.float64), Layout.zigzag(8, world)
    padding = torch.stack([at >= n for n in lengths])[:, None, None]
    if same_in_every_row:
        padding, lengths = padding[:1], (5, 5)

    def call(group):
        local = (sbhd(cut.shard(x, connect(group).rank)) for x in qkv)
        return sbhd(build(group, mask_type=mask_type)(*local, padding).unflatten(-1, (6, 4)))

    got = together(run_local(world, call), cut)
    for row, n in enumerate(lengths):
        expected, _ = dense_attention(*(x[[row]] for x in qkv), band.dense(at, at) & (at < n))
        assert (got[[row]] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("softmax_type", ["off-by-one", "learnable"])
def test_softmax_offsets_are_one_more_logit_a_head(world, softmax_type):
    length = 4 * world
    q, k, v = (x.requires_grad_() for x in random_qkv(2, length, 6, 2, 4, torch.float64))
    at, cut = torch.arange(length), Layout.zigzag(length, world)
    sinks = torch.linspace(-1, 2, 6, dtype=torch.float64) * (softmax_type == "learnable")
    sinks.requires_grad_()
    expected, _ = dense_attention(q, k, v, Mask.causal().dense(at, at), sinks=sinks)
    expected.square().sum().backward()

    def call(group):
        attention = build(group, softmax_type=softmax_type, params_dtype=torch.float64)
        assert len(list(attention.parameters())) == len(attention.state_dict()) == (softmax_type == "learnable")
        with torch.no_grad():
            attention.softmax_offset.copy_(sinks)
        out = attention(*(sbhd(cut.shard(x.detach(), connect(group).rank)) for x in (q, k, v)), None)
        out.square().sum().backward() if softmax_type == "learnable" else None
        return sbhd(out.detach().unflatten(-1, (6, 4))), attention.softmax_offset.grad

    outs, grads = zip(*run_local(world, call))
    assert (together(outs, cut) - expected).abs().max() < 1e-12
    if softmax_type == "learnable":
        assert (sum(grads) - sinks.grad).abs().max() < 1e-12


def test_tensor_parallel_ranks_hold_their_own_heads_softmax_offsets():
    class Group:
        def __init__(self, rank, world):
            self.rank, self.size = lambda: rank, lambda: world

    def offsets(rank, world):
        torch.manual_seed(3)
        groups = ProcessGroupCollection()
        groups.tp, groups.cp = Group(rank, world), None
        config = TransformerConfig(
            **SIZES, attention_dropout=0.0, softmax_type="learnable", use_cpu_initialization=True
        )
        made = TokenRingAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups).softmax_offset
        assert made.tensor_model_parallel and made.partition_dim == 0
        return made.detach()

    whole = offsets(0, 1)
    assert whole.unique().numel() == 6
    assert torch.equal(torch.cat([offsets(0, 2), offsets(1, 2)]), whole)


@pytest.mark.parametrize(
    ("options", "name", "backward"),
    [
        ({"cp_comm_type": "p2p"}, "ring", "ring"),
        ({"cp_comm_type": "all_gather"}, "gather", "gather"),
        ({"cp_comm_type": "allgather"}, "gather", "gather"),
        ({"cp_comm_type": "a2a"}, "ulysses", "ulysses"),
        ({"cp_comm_type": "mesh:2x1"}, "mesh:2x1", "mesh:2x1"),
        ({"cp_comm_type": "p2p", "schedule": "tokenring"}, "tokenring", "tokenring"),
        ({"schedule": "biring", "backward_schedule": "gather"}, "biring", "gather"),
        (
            {"schedule": "tokenring", "backward_schedule": "ring:direct", "partial_dtype": "float32"},
            "tokenring",
            "ring:direct",
        ),
        ({}, "auto", "auto"),
    ],
)
def test_cp_comm_type_names_the_schedule_and_a_schedule_wins(options, name, backward):
    qkv = random_qkv(1, 16, 6, 2, 4, torch.float64)
    cut, shape = Layout.zigzag(16, 2), AttentionShape(1, 16, 16, 6, 2, 4, dtype=torch.float64)
    planned = {"world": 2, "shape": shape, "layout": cut, "mask": "causal"}

    def call(group):
        local = [sbhd(cut.shard(x, connect(group).rank)).requires_grad_() for x in qkv]
        with count_traffic(group) as forward:
            out = build(group, **options)(*local, None)
        with count_traffic(group) as back:
            out.sum().backward()
        return sum(forward.sent.values()), sum(back.sent.values())

    for rank, sent in enumerate(run_local(2, call)):
        wire = options.get("partial_dtype", "input")
        there, home = plan(name, **planned), plan(backward, direction="backward", partial_dtype=wire, **planned)
        assert sent == (there.bytes_sent(rank), home.bytes_sent(rank))


def test_a2a_p2p_takes_the_sizes_of_the_hierarchical_groups():
    qkv, at, cut = random_qkv(1, 16, 6, 2, 4, torch.float64), torch.arange(16), Layout.zigzag(16, 4)
    expected, _ = dense_attention(*qkv, Mask.causal().dense(at, at))

    def call(group):
        groups = ProcessGroupCollection()
        groups.tp, groups.cp, groups.hcp = None, group, [LocalWorld(2).groups()[0], LocalWorld(2).groups()[0]]
        config = TransformerConfig(**SIZES, attention_dropout=0.0, context_parallel_size=4)
        args = (config, 1, AttnMaskType.causal, "self")
        attention = TokenRingAttention(*args, pg_collection=groups, cp_comm_type="a2a+p2p")
        assert attention.schedules == ("usp:2x2", "usp:2x2")
        local = (sbhd(cut.shard(x, connect(group).rank)) for x in qkv)
        return sbhd(attention(*local, None).unflatten(-1, (6, 4)))

    assert (together(run_local(4, call), cut) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [None, (4, 0)])
def test_with_prepare_the_ranks_agree_once_for_each_shape(kind):
    def call(group):
        control, layers = [], [build(group, prepare=True, schedule="ring", window_size=kind) for _ in range(2)]
        outs = []
        for length in (16, 16, 24, 16):
            cut, qkv = Layout.zigzag(length, 2), random_qkv(2, length, 6, 2, 4, torch.float64)
            local = [sbhd(cut.shard(x, connect(group).rank)).requires_grad_() for x in qkv]
            with count_traffic(group) as traffic:
                outs.append([layer(*local, None) for layer in layers])
                torch.stack(outs[-1]).sum().backward()
            control.append(sum(traffic.control.values()))
        return control, sbhd(outs[-1][1].detach().unflatten(-1, (6, 4)))

    got = run_local(2, call)
    assert all([bool(sent) for sent in control] == [True, False, True, False] for control, _ in got)
    at, cut = torch.arange(16), Layout.zigzag(16, 2)
    band = Mask.causal() if kind is None else Mask.window(4)
    expected, _ = dense_attention(*random_qkv(2, 16, 6, 2, 4, torch.float64), band.dense(at, at))
    assert (together([out for _, out in got], cut) - expected).abs().max() < 1e-12

"""Packed documents and groups of one micro-batch: Megatron's `PackedSeqParams` on in-process ranks equals dense attention."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import pytest
import torch

from tests.oracle import dense_attention, random_qkv
from tests.tokenring.megatron_dense import Partition, assert_dense, build, inside_documents, packing, params, sbhd
from tests.tokenring.megatron_shim import PackedSeqParams
from tokenring import Layout, Mask, run_local
from tokenring.integrations import megatron_packing
from tokenring.transport.inprocess import LocalWorld


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("mask_type", "window", "band"),
    [
        ("causal", None, Mask.causal()),
        ("padding_causal", (2, 0), Mask.window(2)),
        ("no_mask", None, Mask.full()),
        ("padding", None, Mask.full()),
    ],
)
def test_packed_documents_see_themselves_and_never_padding(world, mask_type, window, band):
    for lengths, spare in (([3, 1, 7, 12], 0), ([5, 2], 1)):
        cu, padded, documents = packing(lengths, world, spare)
        qkv = random_qkv(1, padded[-1], 6, 2, 4, torch.float64, v_dim=3, seed=world)
        allowed = inside_documents(documents, padded[-1], band)
        assert_dense(
            world,
            qkv,
            allowed,
            Partition(padded, world),
            rows=torch.cat(documents),
            call={"packed_seq_params": params(cu, padded), "attention_mask": torch.tensor([1])},
            mask_type=mask_type,
            window_size=window,
        )


@pytest.mark.parametrize("world", [2, 3])
def test_a_packed_stream_that_the_loader_cut_once(world):
    """Documents of any length, an empty one, and rows after the last: `packed_layout="sequence"`."""
    cu, total = [0, 5, 5, 12, 23], 24
    documents = [torch.arange(a, b) for a, b in pairwise(cu)]
    qkv = random_qkv(1, total, 6, 2, 4, torch.float64, seed=world)
    allowed = inside_documents(documents, total, Mask.causal())
    call, cut = {"packed_seq_params": params(cu, None)}, Layout.zigzag(total, world)
    assert_dense(world, qkv, allowed, cut, rows=slice(0, 23), call=call, packed_layout="sequence")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_cross_attention_has_keys_of_another_length(world):
    rows, keys = 4 * world, 6 * world
    qkv = random_qkv(2, rows, 6, 3, 4, torch.float64, kv_length=keys, seed=world)
    allowed, cuts = torch.ones(rows, keys, dtype=torch.bool), (Layout.zigzag(rows, world), Layout.zigzag(keys, world))
    assert_dense(world, qkv, allowed, *cuts, mask_type="no_mask", attention_type="cross")
    cu, padded, _ = packing([2 * world, 2 * world], world)
    kv_cu, kv_padded, documents = packing([3, 4 * world - 1], world)
    allowed = torch.zeros(padded[-1], kv_padded[-1], dtype=torch.bool)
    for (start, stop), seen in zip(pairwise(padded), documents):
        allowed[start:stop, seen] = True
    qkv = random_qkv(1, padded[-1], 6, 3, 4, torch.float64, kv_length=kv_padded[-1], seed=world)
    call = {"packed_seq_params": params(cu, padded, kv_cu, kv_padded)}
    cuts = (Partition(padded, world), Partition(kv_padded, world))
    assert_dense(world, qkv, allowed, *cuts, call=call, mask_type="padding", attention_type="cross")


def test_cu_seqlens_are_read_once_for_a_micro_batch_and_again_when_they_change():
    packed = params([0, 4, 10], None)
    attention, (q, k, v) = build(None), (x[0] for x in random_qkv(1, 10, 6, 2, 4, torch.float64))
    with mock.patch.object(megatron_packing, "_numbers", wraps=megatron_packing._numbers) as reads:
        first = attention(q, k, v, None, packed_seq_params=packed)
        once = reads.call_count
        assert torch.equal(attention(q, k, v, None, packed_seq_params=packed), first)
        assert torch.equal(build(None)(q, k, v, None, packed_seq_params=packed), first)
        assert reads.call_count == once > 0
    packed.cu_seqlens_q[1] = packed.cu_seqlens_kv[1] = 7
    changed = attention(q, k, v, None, packed_seq_params=packed)
    assert torch.equal(changed, attention(q, k, v, None, packed_seq_params=params([0, 7, 10], None)))
    assert not torch.equal(changed[4:7], first[4:7])


def dynamic(group, qkv, pairs):
    """Two calls of one module: the first on groups of two ranks, the second on no group at all; then its own group again."""
    rank, length = group.rank(), qkv[0].shape[1]
    attention, outs = build(group), []
    own = pairs[rank // 2][rank % 2]
    for cut, packed in (
        (Layout.zigzag(length, 2), PackedSeqParams(qkv_format="sbhd", local_cp_size=2, cp_group=own)),
        (Layout.zigzag(length, 1), PackedSeqParams(qkv_format="sbhd", local_cp_size=1)),
        (Layout.zigzag(length, 4), None),
    ):
        at = {4: rank, 2: rank % 2, 1: 0}[cut.world]
        data = qkv if cut.world == 4 else [x[[rank // 2]] for x in qkv]
        outs.append(attention(*(sbhd(cut.shard(x, at)) for x in data), None, packed_seq_params=packed))
    return outs


def test_a_micro_batch_may_bring_its_own_group():
    qkv, at = random_qkv(2, 16, 6, 2, 4, torch.float64), torch.arange(16)
    expected, _ = dense_attention(*qkv, Mask.causal().dense(at, at))
    pairs = [LocalWorld(2).groups() for _ in range(2)]
    for rank, (pair, alone, all_four) in enumerate(run_local(4, dynamic, qkv, pairs)):
        mine = expected[[rank // 2]]
        for out, cut, r, whole in (
            (pair, Layout.zigzag(16, 2), rank % 2, mine),
            (alone, Layout.zigzag(16, 1), 0, mine),
            (all_four, Layout.zigzag(16, 4), rank, expected),
        ):
            assert (out - sbhd(cut.shard(whole, r)).flatten(2)).abs().max() < 1e-12

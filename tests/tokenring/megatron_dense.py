"""Megatron's core attention as Megatron builds and calls it, on ranks that are threads, against dense attention."""

from __future__ import annotations

from itertools import accumulate

import torch

from tests.oracle import dense_attention
from tests.tokenring.megatron_shim import AttnMaskType, PackedSeqParams, ProcessGroupCollection, TransformerConfig
from tokenring import connect, run_local
from tokenring.integrations.megatron import TokenRingAttention

SIZES = {"num_layers": 1, "hidden_size": 24, "num_attention_heads": 6, "num_query_groups": 2}
OWN: tuple[str, ...] = (
    "schedule",
    "backward_schedule",
    "kernel",
    "partial_dtype",
    "topology",
    "packed_layout",
    "layer_has",
    "prepare",
)
OWN += ("softmax_scale", "cp_comm_type")


def build(group, mask_type="causal", attention_type="self", **options):
    """The module as Megatron builds it, for a group that stands for `pg_collection.cp`; other options are the config's."""
    own = {name: options.pop(name) for name in OWN if name in options}
    world = 1 if group is None else group.size()
    settings = {"attention_dropout": 0.0, "context_parallel_size": world, "use_cpu_initialization": True}
    groups = ProcessGroupCollection()
    groups.tp, groups.cp = None, group
    config = TransformerConfig(**SIZES | settings | options)
    return TokenRingAttention(config, 1, AttnMaskType[mask_type], attention_type, pg_collection=groups, **own)


def sbhd(x):
    return x.transpose(0, 1).contiguous()


def attend(group, qkv, do, cuts, call, options):
    """(out, dq, dk, dv) of this rank's rows as (B, rows, H, D); packed documents enter and leave without the batch."""
    rank, packed = connect(group).rank, call.get("packed_seq_params")
    thd = packed is not None and packed.qkv_format == "thd"
    enter, leave = ((lambda x: x[0].clone()), (lambda x: x[None])) if thd else (sbhd, sbhd)
    q, k, v = (enter(cut.shard(x, rank)).requires_grad_() for x, cut in zip(qkv, (cuts[0], cuts[1], cuts[1])))
    out = build(group, **options)(q, k, v, **{"attention_mask": None, **call})
    assert out.shape == (*q.shape[:-2], do.shape[2] * do.shape[3]) and out.is_contiguous()
    out.backward(enter(cuts[0].shard(do, rank)).flatten(-2))
    return leave(out.detach().unflatten(-1, do.shape[2:])), *(leave(x.grad) for x in (q, k, v))


def together(parts, cut):
    whole = parts[0].new_empty(parts[0].shape[0], cut.total, *parts[0].shape[2:])
    for rank, part in enumerate(parts):
        whole[:, cut.positions(rank)] = part
    return whole


def assert_dense(world, qkv, allowed, q_cut, kv_cut=None, rows=slice(None), call=None, **options):
    """Out and all gradients of `world` ranks are those of dense attention, loss taken at the query `rows` only."""
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    out, _ = dense_attention(q, k, v, allowed, scale=options.get("softmax_scale"))
    do = torch.zeros_like(out)
    do[:, rows] = torch.randn(do[:, rows].shape, generator=torch.Generator().manual_seed(9), dtype=do.dtype)
    out.backward(do)
    cuts = (q_cut, kv_cut or q_cut)
    got = run_local(world, attend, qkv, do, cuts, call or {}, options)
    expected = {"out": out[:, rows], "dq": q.grad, "dk": k.grad, "dv": v.grad}
    for (name, wanted), parts, cut in zip(expected.items(), zip(*got), (cuts[0], *cuts, cuts[1])):
        error = (together(parts, cut)[:, rows if name == "out" else slice(None)] - wanted).abs().max()
        assert error < 1e-12, (name, error)


def partition(cu_padded, world, rank):
    """Transformer Engine's `thd_get_partitioned_indices`, row by row: the oracle for the cut of packed documents."""
    ends, rows = [n // world for n in cu_padded], []
    for row in range(cu_padded[-1] // world):
        document = max(d for d, end in enumerate(ends[:-1]) if end <= row)
        width, inside = ends[document + 1] - ends[document], row - ends[document]
        chunk = rank if inside < width // 2 else 2 * (world - 1) - rank
        rows.append(inside + ends[document] * world + width // 2 * chunk)
    return torch.tensor(rows)


class Partition:
    """What `attend` needs of a layout, from the oracle's rows."""

    def __init__(self, cu_padded, world):
        self.total, self.rows = cu_padded[-1], [partition(cu_padded, world, r) for r in range(world)]

    def positions(self, rank):
        return self.rows[rank]

    def shard(self, x, rank):
        return x[:, self.rows[rank]]


def packing(lengths, world, spare=0):
    """Documents padded to a multiple of 2 * world, and `spare` chunks more: (cu_seqlens, cu_seqlens_padded, real rows)."""
    places = [0, *accumulate(2 * world * (-(-n // (2 * world)) + spare) for n in lengths)]
    rows = [torch.arange(start, start + n) for start, n in zip(places, lengths)]
    return [0, *accumulate(lengths)], places, rows


def params(cu, padded, kv=None, kv_padded=None, **more):
    numbers = {"cu_seqlens_q": cu, "cu_seqlens_kv": kv or cu}
    numbers |= {"cu_seqlens_q_padded": padded, "cu_seqlens_kv_padded": kv_padded or padded}
    tensors = {name: None if n is None else torch.tensor(n, dtype=torch.int32) for name, n in numbers.items()}
    return PackedSeqParams(qkv_format="thd", max_seqlen_q=99, max_seqlen_kv=99, **tensors, **more)


def inside_documents(documents, total, band):
    allowed = torch.zeros(total, total, dtype=torch.bool)
    for rows in documents:
        allowed[rows[:, None], rows[None]] = band.dense(rows, rows)
    return allowed

"""Backward under the plan that forward found: every rank's share for the rows it was sent goes home the way they came.

    dk_j = sum over ranks that row j was sent to of their dk_j          (dv alike), added by its owner in float32

Partial gradients travel in the inputs' dtype, as tokenring's direct schedules send them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.distributed.call import Call
from sparse_attn.distributed.cut import rows_of
from sparse_attn.distributed.exchange import Counts, Wire, row_plan
from sparse_attn.gradients import gradients
from sparse_attn.kernels.blocks import Blocks
from sparse_attn.kernels.choice import block_kernel
from tokenring import Plan
from tokenring.agreement import agree
from tokenring.merge import accumulator_dtype


def backward(
    call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of this rank's rows. Collective; out and lse are what forward returned."""
    made, wire = call.settled, Wire(call.runtime)
    assert made is not None and call.plan is not None
    with call.runtime.shared_fate(), torch.autocast(q.device.type, enabled=False):
        plan = home_plan(call, k, v)
        agree(call.runtime, plan, (), forward_call=call.number)
        blocks = Blocks.of(block_kernel(call.kernel), q, v, call.scale)
        dq, *parts = gradients(blocks, call.plan, q, made.keys, made.values, out, lse, do)
        for part in parts:
            _fold_kept(call, part)
        arrived = wire.run(plan, tuple(_leaving(call, part)[None, :, None] for part in parts))
        dk, dv = (_at_home(call, part[:, : k.shape[1]], come[0, :, 0]) for part, come in zip(parts, arrived))
    call.stats.backward_plans = wire.plans
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def home_plan(call: Call, k: Tensor, v: Tensor) -> Plan:
    """The exchange of a backward pass: each row and head that was sent comes back once."""
    assert call.settled is not None
    halos, sent, heads = call.cut.halos, call.settled.counts, k.shape[0] * k.shape[2]
    ranks = range(call.cut.world)
    counts: Counts = tuple(
        tuple(sum(p.rows for p in halos[d] if p.owner == s) * heads + sent[s][d] for s in ranks) for d in ranks
    )
    return row_plan("gradients", counts, k.dtype, k.shape[3], v.shape[3], direction="backward")


def _fold_kept(call: Call, part: Tensor) -> None:
    """Rows to keep are copies of rows that the workspace holds already."""
    rows = call.kept_rows.to(part.device)
    first = call.cut.layout.length(call.rank) + call.cut.halo_rows(call.rank)
    part[:, rows] += part[:, first : first + len(rows)]


def _leaving(call: Call, part: Tensor) -> Tensor:
    """(rows, D): what goes to each other rank: its rows of the halo, all heads, then its wanted rows, head by head."""
    wanted, row, parts = call.settled.wanted, call.cut.layout.length(call.rank), []
    halo: dict[int, list[tuple[int, int]]] = {}
    for piece in call.cut.halos[call.rank]:
        halo.setdefault(piece.owner, []).append((row, row + piece.rows))
        row += piece.rows
    heads, columns, far = (x.split(wanted.counts) for x in (wanted.heads, wanted.columns, wanted.far))
    for owner in range(call.cut.world):
        if owner != call.rank:
            near = part[:, rows_of(halo.get(owner, ()), part.device)].transpose(0, 1)
            key_heads = part.shape[2]
            mine = heads[owner][far[owner]]
            wide = part[mine // key_heads, columns[owner][far[owner]], mine % key_heads]
            parts += [near.reshape(-1, part.shape[3]), wide]
    return torch.cat([part.new_empty(0, part.shape[3]), *parts])


def _at_home(call: Call, own: Tensor, arrived: Tensor) -> Tensor:
    """(B, rows, Hkv, D): this rank's own share and those of the others, summed."""
    total = own.to(accumulator_dtype(own.dtype), copy=True)
    batch, length, key_heads, dim = own.shape
    first = 0
    for rank in range(call.cut.world):
        if rank != call.rank:
            here = rows_of(((p.start, p.stop) for p in call.cut.halos[rank] if p.owner == call.rank), own.device)
            near = arrived[first : first + len(here) * batch * key_heads].view(-1, batch, key_heads, dim)
            total[:, here] += near.transpose(0, 1).to(total.dtype)
            first += near.numel() // dim
            where = call.settled.sent[rank][:, 0].long()
            heads, rows = where // max(1, length), where % max(1, length)
            total[heads // key_heads, rows, heads % key_heads] += arrived[first : first + len(where)].to(total.dtype)
            first += len(where)
    return total

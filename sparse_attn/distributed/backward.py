"""Backward under the plan that forward found: every rank's share for the rows it was sent goes home the way they came.

    dk_j = sum over ranks that row j was sent to of their dk_j          (dv alike), added by its owner in float32

The rows that were sent for stripes come first: their shares travel while this rank computes those of the rows it holds. Partial
gradients travel in the inputs' dtype, as tokenring's direct schedules send them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.autograd import Gradients
from sparse_attn.distributed.call import Call
from sparse_attn.distributed.cut import rows_of
from sparse_attn.distributed.exchange import Counts, Wire, mirrored, row_plan
from sparse_attn.gradients import add_gradients, whole_rows, zeros
from sparse_attn.kernels.blocks import Blocks
from sparse_attn.kernels.choice import block_kernel
from tokenring import Plan
from tokenring.agreement import agree
from tokenring.plans.step import AHEAD_LANE


def backward(call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor) -> Gradients:
    """dq, dk, dv of this rank's rows. Collective; out and lse are what forward returned."""
    made, wire = call.made, Wire(call.runtime)
    assert made is not None
    with call.runtime.shared_fate():
        stripes, halo = home_plans(call, k, v)
        agree(call.runtime, stripes, (), forward_call=call.number)
        blocks, queries = Blocks.of(block_kernel(call.kernel), q, v, call.scale), whole_rows(q, out, lse, do)
        dq, *far = zeros(q, *made.far)
        add_gradients(blocks, made.far_plan, queries, *made.far, (dq, *far), anchors=False)
        leaving = wire.begin(stripes, tuple(_far(call, x).to(k.dtype) for x in far))
        _, *near = zeros(q[:, :0], *made.near)
        add_gradients(blocks, made.near_plan, queries, *made.near, (dq, *near))
        for total in near:
            _fold_kept(call, total)
        around = wire.begin(halo, tuple(_halo(call, x).to(k.dtype) for x in near))
        dk, dv = (x[:, : k.shape[1]] for x in near)
        for total, arrived in zip((dk, dv), leaving.land()):
            _add_stripes(call, total, arrived)
        for total, arrived in zip((dk, dv), around.land()):
            _add_halo(call, total, arrived)
    call.stats.backward_plans = wire.plans
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def home_plans(call: Call, k: Tensor, v: Tensor) -> tuple[Plan, Plan]:
    """The exchanges of a backward pass, stripes and halo: each row and head that was sent comes back once."""
    assert call.made is not None
    cut, heads, ranks = call.cut, k.shape[0] * k.shape[2], range(call.cut.world)
    around: Counts = tuple(
        tuple(sum(p.rows for p in cut.halos[d] if p.owner == s) * heads for s in ranks) for d in ranks
    )
    dims = k.dtype, k.shape[3], v.shape[3]
    back = mirrored(call.made.counts)
    stripes = row_plan("gradients:stripes", back, *dims, direction="backward", lane=AHEAD_LANE)
    return stripes, row_plan("gradients:halo", around, *dims, direction="backward")


def _fold_kept(call: Call, total: Tensor) -> None:
    """Rows to keep are copies of rows that lie among the others already."""
    rows, first = call.kept_rows.to(total.device), call.cut.base(call.rank)
    total[:, rows] += total[:, first : first + len(rows)]


def _far(call: Call, total: Tensor) -> Tensor:
    """(rows, D): the shares of rows that were sent here for stripes, owner by owner, in the order of their lines."""
    wanted, key_heads = call.made.wanted, total.shape[2]
    heads, columns = wanted.heads[wanted.far], wanted.columns[wanted.far]
    return total[heads // key_heads, columns, heads % key_heads]


def _halo(call: Call, total: Tensor) -> Tensor:
    """(rows, D): the shares of the halo's rows, owner by owner, batch entry by batch entry, all heads of a row side by side."""
    row, spans = call.cut.kv_layout.length(call.rank), {}
    for piece in call.cut.halos[call.rank]:
        spans.setdefault(piece.owner, []).append((row, row + piece.rows))
        row += piece.rows
    parts = [total[:, rows_of(spans[owner], total.device)].flatten(0, 2) for owner in sorted(spans)]
    return torch.cat([total.new_empty(0, total.shape[3]), *parts])


def _add_stripes(call: Call, total: Tensor, arrived: Tensor) -> None:
    """Shares (rows, D) from all other ranks join those of this rank (B, rows, Hkv, D)."""
    length, key_heads = max(1, total.shape[1]), total.shape[2]
    others = [lines for rank, lines in enumerate(call.made.sent) if rank != call.rank]
    for lines, part in zip(others, arrived.split(list(map(len, others)))):
        where = lines[:, 0].long()
        heads, rows = where // length, where % length
        total[heads // key_heads, rows, heads % key_heads] += part.to(total.dtype)


def _add_halo(call: Call, total: Tensor, arrived: Tensor) -> None:
    """The same of rows that were sent as halo; of each rank every row comes once."""
    batch, _, key_heads, dim = total.shape
    halos = [halo for rank, halo in enumerate(call.cut.halos) if rank != call.rank]
    rows = [rows_of(((p.start, p.stop) for p in halo if p.owner == call.rank), total.device) for halo in halos]
    for here, part in zip(rows, arrived.split([len(x) * batch * key_heads for x in rows])):
        total[:, here] += part.view(batch, -1, key_heads, dim).to(total.dtype)

"""Both passes on torch operators: any device, any length, memory linear in length.

Matrix products where those are quicker (`products.py`, `resumed.py`), else block kernels: anchor regions of groups alike as batch
entries of one call; stripes a list at a time, whose chosen rows are gathered once.
"""

from __future__ import annotations

from torch import Tensor

from sparse_attn.folding import ROWS_AT_ONCE, alike, fold, prefixes
from sparse_attn.geometry import Geometry, Group
from sparse_attn.kernels import products
from sparse_attn.kernels.blocks import Blocks
from sparse_attn.kernels.gathered import Rows
from sparse_attn.kernels.resumed import Resumed
from sparse_attn.kernels.state import AnchorState
from sparse_attn.stripes import StripePlan, within
from tokenring.merge import merge_


class TorchKernel:
    """Anchor region and stripes through a tokenring block kernel, "auto" or by name."""

    def __init__(self, name: str, q: Tensor, v: Tensor, scale: float) -> None:
        self.blocks = Blocks.of(name, q, v, scale)
        self.by_products = name == "auto"

    def anchor(self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, keep: Tensor | None) -> AnchorState:
        """Exact attention of every row over its anchor region."""
        if self.by_products and products.takes(q):
            state = products.anchor_region(q, k, v, geometry, self.blocks.scale)
        else:
            state = self._anchor_in_blocks(q, k, v, geometry)
        if keep is None or not len(keep):
            return state
        for group in geometry.groups:
            self._join_kept(state.out, state.lse, q, k, v, group, keep)
        return state._replace(top=None)

    def _anchor_in_blocks(self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> AnchorState:
        out, lse, _ = AnchorState.unfilled(q, v.shape[3])
        for groups in alike(geometry, ROWS_AT_ONCE):
            rows = slice(groups[0].rows[0], groups[-1].rows[1])
            own_keys = slice(groups[0].diagonal, groups[-1].diagonal + groups[-1].count)
            folded = [fold(x, len(groups)) for x in (q[:, rows], k[:, own_keys], v[:, own_keys])]
            part_out, part_lse = self.blocks.attend(*folded, causal=True)
            prefix = [prefixes(x, groups) for x in (k, v)]
            if groups[0].prefix:
                before, before_lse = self.blocks.attend(folded[0], *prefix)
                part_out = part_out.to(out.dtype)
                merge_(part_out, part_lse, before, before_lse)
            out[:, rows] = part_out.reshape(out[:, rows].shape)
            lse[:, :, rows] = part_lse.unflatten(0, (-1, len(groups))).transpose(1, 2).flatten(2)
        return AnchorState(out, lse, None)

    def _join_kept(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, group: Group, keep: Tensor) -> None:
        columns, rows = within(keep, group.candidates), slice(*group.rows)
        if len(columns):
            part = self.blocks.attend(q[:, rows], k.index_select(1, columns), v.index_select(1, columns))
            merge_(out[:, rows], lse[:, :, rows], *part)

    def stripes_(self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: StripePlan) -> None:
        """Every group's columns join (out, lse) of its rows, in place."""
        resumed = Resumed(q, k, v, self.blocks.scale) if self.by_products and products.takes(q) else None
        scratch = Rows(k), Rows(v)
        for number, group in enumerate(plan.geometry.groups):
            rows = slice(*group.rows)
            for place, columns in enumerate(plan.lists(number)):
                entry, queries, key_head = heads_of(plan, place)
                if not len(columns) or (resumed and resumed.join_(out, lse, entry, rows, queries, key_head, columns)):
                    continue
                both = (x.gathered(entry, key_head, columns)[None, :, None] for x in scratch)
                part = self.blocks.attend(q[entry, rows, queries].unsqueeze(0), *both)
                merge_(out[entry, rows, queries].unsqueeze(0), lse[entry, queries, rows].unsqueeze(0), *part)


def heads_of(plan: StripePlan, place: int) -> tuple[int, slice, int]:
    """Batch entry, query heads and key head of a list of a group."""
    entry, head = divmod(place, plan.heads)
    each = plan.q_heads // plan.kv_heads
    if plan.share == "query":
        return entry, slice(head, head + 1), head // each
    return entry, slice(head * each, (head + 1) * each), head

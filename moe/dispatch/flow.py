"""A route: the hops of one batch, and the two linear maps they make.

    spread   (T, H) -> (M, H)   rows go through the hops and are laid out expert by expert, a copy for each entry
    collect  (M, H) -> (T, H)   its adjoint: entries of a row are added up where they are, and sums go back hop by hop

Dispatch is spread with collect as its backward; combine is collect with spread as its backward. So every pass moves the same
rows over the same links.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.dispatch.hop import Hop
from moe.dispatch.rows import add_up, pick, scale_with_dots
from moe.dispatch.wire import Entries

ROWS_NEED_GRAD, WEIGHTS_NEED_GRAD = 1, 2


@dataclass
class Route:
    """What became of one batch's choices; holds no rows."""

    hops: list[Hop]
    first_entries: Tensor
    """(n,) int64: which of the T k choices, row by row, were no -1."""
    choices: tuple[int, int]
    """(T, k)."""
    token_row: Tensor
    """(M,) int64: row behind each expert-major token; -1 where it is filling."""
    place: Tensor
    """(n',) int64: expert-major place of each entry held after the hops."""
    counts: Tensor
    """Entries of each row held after the hops."""
    tokens_per_expert: Tensor
    """(local experts,) int64, filling included."""
    flags: int
    """What the ranks agreed needs gradients."""

    def spread(self, x: Tensor) -> Tensor:
        """(T, H) -> (M, H); filling is zero."""
        for hop in self.hops:
            x = hop.forward(x)
        if self.place.numel() == self.token_row.numel():
            return pick(x, self.token_row)
        out = x.new_zeros(self.token_row.numel(), x.shape[1])
        return out.index_copy_(0, self.place, pick(x, self.token_row[self.place]))

    def collect(self, y: Tensor, weights: Tensor | None) -> Tensor:
        """(M, H), and weights (M,) or None for ones -> (T, H) in y's dtype."""
        held = None if weights is None else weights[self.place]
        if not self.hops:
            return add_up(y, self.place, self.counts, held, y.dtype)
        last = self.hops[-1]
        ends = torch.tensor(last.received_entries).cumsum(0).tolist()

        def summed(peer: int) -> Tensor:
            entries = slice(ends[peer] - last.received_entries[peer], ends[peer])
            counts = self.counts.split(last.received)[peer]
            return add_up(y, self.place[entries], counts, None if held is None else held[entries], y.dtype)

        total = last.reverse(summed, y)
        for hop in reversed(self.hops[:-1]):
            parts = total.to(y.dtype).split(hop.received)
            total = hop.reverse(parts.__getitem__, y)
        return total.to(y.dtype)

    def collect_entries(self, values: Tensor) -> Tensor:
        """(M,) numbers -> (T, k): each goes back to the choice it is for; choices of -1 get 0."""
        values = values[self.place]
        for hop in reversed(self.hops):
            values = hop.reverse_entries(values)
        out = values.new_zeros(self.choices[0] * self.choices[1])
        out[self.first_entries] = values
        return out.view(self.choices)


def lay_out(held: Entries, first_expert: int, local_experts: int, align: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token_row, place, weights, tokens_per_expert): entries in the order of experts, each expert's filled up to `align`."""
    local = held.expert - first_expert
    real = torch.bincount(local, minlength=local_experts)
    order = local.argsort(stable=True)
    sizes = torch.div(real + align - 1, align, rounding_mode="floor") * align
    start = sizes.cumsum(0) - sizes
    before = real.cumsum(0) - real
    expert = local[order]
    position = torch.arange(order.numel(), device=order.device) - before[expert] + start[expert]
    place = torch.empty_like(order)
    place[order] = position
    total = order.numel() if align == 1 else int(sizes.sum())
    token_row = torch.full((total,), -1, dtype=torch.int64, device=order.device)
    token_row[place] = held.row
    weights = held.weight.new_zeros(total)
    weights[place] = held.weight
    return token_row, place, weights, sizes


class Dispatch(torch.autograd.Function):
    """Tokens and weights for the experts; the third result ties the backward of `Combine` to this one's."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weights: Tensor, laid: Tensor, route: Route) -> tuple[Tensor, Tensor, Tensor]:
        ctx.route, ctx.like = route, (weights.dtype, hidden.dtype)
        return route.spread(hidden), laid.clone(), hidden.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_tokens: Tensor, d_laid: Tensor, tie: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        route: Route = ctx.route
        d_hidden = route.collect(d_tokens.contiguous(), None) if route.flags & ROWS_NEED_GRAD else None
        d_weights = route.collect_entries(d_laid.contiguous()) if route.flags & WEIGHTS_NEED_GRAD else None
        return d_hidden, d_weights, None, None


class Combine(torch.autograd.Function):
    """Weighted sums of what the experts gave, back at the ranks the tokens are from."""

    @staticmethod
    def forward(ctx, y: Tensor, weights: Tensor | None, tie: Tensor, route: Route) -> Tensor:
        ctx.route = route
        ctx.weighted = weights is not None
        ctx.save_for_backward(*(() if weights is None else (y, weights)))
        return route.collect(y, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, None]:
        route: Route = ctx.route
        d_y, d_weights = route.spread(d_out.contiguous()), None
        if ctx.weighted:
            y, weights = ctx.saved_tensors
            d_weights = scale_with_dots(d_y, weights, y, want_dots=bool(route.flags & WEIGHTS_NEED_GRAD))
        return d_y, d_weights, d_out.new_zeros(0), None

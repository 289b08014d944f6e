"""A route: the hops of one batch, and the two linear maps they make.

    spread   (T, H) -> (M, H)   rows go through the hops and are laid out expert by expert, a copy for each entry
    collect  (M, H) -> (T, H)   its adjoint: entries of a row are added up where they are, and sums go back hop by hop

Dispatch is spread with collect as its backward; combine is collect with spread as its backward. So every pass moves the same
rows over the same links.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.dispatch.hop import Flight, Hop
from moe.dispatch.rows import add_up, scale_with_dots
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

    def start_spread(self, x: Tensor) -> Flight | Tensor:
        """Post the first hop of (T, H) rows; rows themselves where there is no hop."""
        return self.hops[0].start(x) if self.hops else x

    def finish_spread(self, flight: Flight | Tensor) -> Tensor:
        """The other hops, and the rows (M, H) expert by expert; filling is zero."""
        x = self.hops[0].finish(flight) if self.hops else flight
        for hop in self.hops[1:]:
            x = hop.finish(hop.start(x))
        if self.place.numel() == self.token_row.numel():
            return x.index_select(0, self.token_row)
        out = x.new_zeros(self.token_row.numel(), x.shape[1])
        return out.index_copy_(0, self.place, x.index_select(0, self.token_row[self.place]))

    def start_collect(self, y: Tensor, weights: Tensor | None) -> Flight | Tensor:
        """Add up the entries of each row of (M, H), times weights (M,) or None for ones, and post the way home."""
        held = None if weights is None else weights[self.place]
        if not self.hops:
            return add_up(y, self.place, self.counts, held, y.dtype)
        last = self.hops[-1]
        ends = torch.tensor(last.received_entries).cumsum(0).tolist()

        def summed(peer: int) -> Tensor:
            entries = slice(ends[peer] - last.received_entries[peer], ends[peer])
            counts = self.counts.split(last.received)[peer]
            return add_up(y, self.place[entries], counts, None if held is None else held[entries], y.dtype)

        return last.start_reverse(summed, y)

    def finish_collect(self, flight: Flight | Tensor, like: Tensor) -> Tensor:
        """The rest of the way: sums (T, H) in the dtype of `like`."""
        if not self.hops:
            return flight
        total = self.hops[-1].finish_reverse(flight)
        for hop in reversed(self.hops[:-1]):
            parts = total.to(like.dtype).split(hop.received)
            total = hop.finish_reverse(hop.start_reverse(parts.__getitem__, like))
        return total.to(like.dtype)

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


@dataclass
class Journey:
    """What the two halves of one pass, and those of its backward, hand each other besides tensors."""

    route: Route
    forward: Any = None
    backward: Any = None
    d_entries: Tensor | None = None


class DispatchStart(torch.autograd.Function):
    """Post the rows. The ticket it gives must go to `DispatchFinish`; its backward is the second half of collect."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weights: Tensor, journey: Journey) -> Tensor:
        ctx.journey, ctx.like = journey, hidden.new_empty(0, hidden.shape[1])
        journey.forward = journey.route.start_spread(hidden)
        return torch.zeros_like(ctx.like)

    @staticmethod
    @once_differentiable
    def backward(ctx, ticket: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        journey, route = ctx.journey, ctx.journey.route
        flight, journey.backward = journey.backward, None
        entries, journey.d_entries = journey.d_entries, None
        d_hidden = route.finish_collect(flight, ctx.like) if route.flags & ROWS_NEED_GRAD else None
        d_weights = route.collect_entries(entries) if route.flags & WEIGHTS_NEED_GRAD else None
        return d_hidden, d_weights, None


class DispatchFinish(torch.autograd.Function):
    """Tokens and weights for the experts; the third result ties the backward of combine to this one's."""

    @staticmethod
    def forward(ctx, ticket: Tensor, laid: Tensor, journey: Journey) -> tuple[Tensor, Tensor, Tensor]:
        ctx.journey = journey
        flight, journey.forward = journey.forward, None
        return journey.route.finish_spread(flight), laid.clone(), ticket.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_tokens: Tensor, d_laid: Tensor, tie: Tensor) -> tuple[Tensor, None, None]:
        journey, route = ctx.journey, ctx.journey.route
        if route.flags & ROWS_NEED_GRAD:
            journey.backward = route.start_collect(d_tokens.contiguous(), None)
        journey.d_entries = d_laid.contiguous()
        return d_tokens.new_zeros(0, d_tokens.shape[1]), None, None


class CombineStart(torch.autograd.Function):
    """Add up what the experts gave, row by row, and post it; its backward is the second half of spread."""

    @staticmethod
    def forward(ctx, y: Tensor, weights: Tensor | None, tie: Tensor, journey: Journey) -> Tensor:
        ctx.journey, ctx.weighted = journey, weights is not None
        if weights is not None:
            ctx.save_for_backward(y, weights)
        journey.forward = journey.route.start_collect(y, weights)
        return y.new_zeros(0, y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, ticket: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        journey, d_weights = ctx.journey, None
        flight, journey.backward = journey.backward, None
        d_y = journey.route.finish_spread(flight)
        if ctx.weighted:
            y, weights = ctx.saved_tensors
            d_weights = scale_with_dots(d_y, weights, y, want_dots=bool(journey.route.flags & WEIGHTS_NEED_GRAD))
        return d_y, d_weights, ticket.new_zeros(0), None


class CombineFinish(torch.autograd.Function):
    """Sums at the ranks the tokens are from."""

    @staticmethod
    def forward(ctx, ticket: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        flight, journey.forward = journey.forward, None
        return journey.route.finish_collect(flight, ticket)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, None]:
        ctx.journey.backward = ctx.journey.route.start_spread(d_out.contiguous())
        return d_out.new_zeros(0, d_out.shape[1]), None

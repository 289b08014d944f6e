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

from moe.dispatch.exchange import Exchange, Piece
from moe.dispatch.hop import Hop, Return
from moe.dispatch.landing import Landing
from moe.dispatch.rows import add_up, by_bags, scale_with_dots, sum_dtype

ROWS_NEED_GRAD, WEIGHTS_NEED_GRAD = 1, 2


@dataclass
class Spread:
    """Rows on their way to experts."""

    rows: Tensor
    """Of this rank."""
    exchange: Exchange | None
    """Of the first hop; None where there is none."""
    out: Tensor | None
    """Where they arrive, if there is another hop."""


@dataclass
class Route:
    """What became of one batch's choices; holds no rows."""

    hops: list[Hop]
    first_entries: Tensor
    """(n,) int64: which of the T k choices, row by row, were no -1."""
    choices: tuple[int, int]
    """(T, k)."""
    landing: Landing
    """Where rows lie after the hops."""
    tokens_per_expert: Tensor
    """(local experts,) int64, filling included."""
    flags: int
    """What the ranks agreed needs gradients."""

    def start_spread(self, x: Tensor, patient: bool) -> Spread:
        """Post the first hop of (T, H) rows."""
        if not self.hops:
            return Spread(x, None, None)
        out = self.hops[0].room_for(x) if len(self.hops) > 1 else None
        return Spread(x, self.hops[0].start(x, patient, out), out)

    def finish_spread(self, way: Spread, patient: bool) -> Tensor:
        """The other hops, and the rows (M, H) expert by expert; filling is zero."""
        x, exchange, out = way.rows, way.exchange, way.out
        if exchange is None:
            return self.landing.whole(x)
        for hop, following in zip(self.hops, self.hops[1:]):
            x = hop.arrive(x, exchange, out)
            out = following.room_for(x) if following is not self.hops[-1] else None
            exchange = following.start(x, patient, out)
        return self.landing.pieces(x, exchange, self.hops[-1])

    def start_collect(self, y: Tensor, weights: Tensor | None, patient: bool) -> Return | Tensor:
        """Add up the entries of each row of (M, H), times weights (M,) or None for ones, and post the way home."""
        place, counts = self.landing.place, self.landing.counts
        held = None if weights is None else weights[place]
        if not self.hops:
            return add_up(y, place, counts, held, y.dtype)

        def summed(piece: Piece) -> Tensor:
            rows, entries = self.landing.span(piece, y)
            return add_up(y, place[entries], counts[rows], None if held is None else held[entries], y.dtype)

        def own() -> Tensor:
            hop = self.hops[-1]
            rows, entries = self.landing.span(Piece(hop.stage.place, 0, hop.received[hop.stage.place]), y)
            index = hop.choice.rows_for(hop.stage.place)
            of_all = (
                counts[rows] if index is None else counts.new_zeros(hop.num_rows).index_copy_(0, index, counts[rows])
            )
            return add_up(y, place[entries], of_all, None if held is None else held[entries], y.dtype)

        # straight to where sums go, if rows are in order there and no rounding comes between
        straight = self.hops[-1].choice.counts is not None and by_bags(y, held, sum_dtype(y.dtype))
        return self.hops[-1].start_reverse(summed, y, patient, own if straight else None)

    def finish_collect(self, way: Return | Tensor, like: Tensor, patient: bool) -> Tensor:
        """The rest of the way: sums (T, H) in the dtype of `like`."""
        if not self.hops:
            return way
        total = self.hops[-1].finish_reverse(way)
        for hop in reversed(self.hops[:-1]):
            parts = total.to(like.dtype).split(hop.received)
            total = hop.finish_reverse(hop.start_reverse(lambda p, of=parts: of[p.peer][p.rows], like, patient))
        return total.to(like.dtype)

    def collect_entries(self, values: Tensor) -> Tensor:
        """(M,) numbers -> (T, k): each goes back to the choice it is for; choices of -1 get 0."""
        values = values[self.landing.place]
        for hop in reversed(self.hops):
            values = hop.reverse_entries(values)
        out = values.new_zeros(self.choices[0] * self.choices[1])
        out[self.first_entries] = values
        return out.view(self.choices)


@dataclass
class Journey:
    """What the two halves of one pass, and those of its backward, hand each other besides tensors."""

    route: Route
    patient: bool
    """Whether nothing else is to be done between the halves; see `moe.dispatch.exchange.Exchange`."""
    forward: Any = None
    backward: Any = None
    d_entries: Tensor | None = None


class DispatchStart(torch.autograd.Function):
    """Post the rows. The ticket it gives must go to `DispatchFinish`; its backward is the second half of collect."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weights: Tensor, journey: Journey) -> Tensor:
        ctx.journey, ctx.like = journey, hidden.new_empty(0, hidden.shape[1])
        journey.forward = journey.route.start_spread(hidden, journey.patient)
        return torch.zeros_like(ctx.like)

    @staticmethod
    @once_differentiable
    def backward(ctx, ticket: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        journey, route = ctx.journey, ctx.journey.route
        flight, journey.backward = journey.backward, None
        entries, journey.d_entries = journey.d_entries, None
        d_hidden = route.finish_collect(flight, ctx.like, journey.patient) if route.flags & ROWS_NEED_GRAD else None
        d_weights = route.collect_entries(entries) if route.flags & WEIGHTS_NEED_GRAD else None
        return d_hidden, d_weights, None


class DispatchFinish(torch.autograd.Function):
    """Tokens and weights for the experts; the third result ties the backward of combine to this one's."""

    @staticmethod
    def forward(ctx, ticket: Tensor, laid: Tensor, journey: Journey) -> tuple[Tensor, Tensor, Tensor]:
        ctx.journey = journey
        flight, journey.forward = journey.forward, None
        return journey.route.finish_spread(flight, journey.patient), laid.clone(), ticket.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_tokens: Tensor, d_laid: Tensor, tie: Tensor) -> tuple[Tensor, None, None]:
        journey, route = ctx.journey, ctx.journey.route
        if route.flags & ROWS_NEED_GRAD:
            journey.backward = route.start_collect(d_tokens.contiguous(), None, journey.patient)
        journey.d_entries = d_laid.contiguous()
        return d_tokens.new_zeros(0, d_tokens.shape[1]), None, None


class CombineStart(torch.autograd.Function):
    """Add up what the experts gave, row by row, and post it; its backward is the second half of spread."""

    @staticmethod
    def forward(ctx, y: Tensor, weights: Tensor | None, tie: Tensor, journey: Journey) -> Tensor:
        ctx.journey, ctx.weighted = journey, weights is not None
        if weights is not None:
            ctx.save_for_backward(y, weights)
        journey.forward = journey.route.start_collect(y, weights, journey.patient)
        return y.new_zeros(0, y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, ticket: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        journey, d_weights = ctx.journey, None
        flight, journey.backward = journey.backward, None
        d_y = journey.route.finish_spread(flight, journey.patient)
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
        return journey.route.finish_collect(flight, ticket, journey.patient)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, None]:
        ctx.journey.backward = ctx.journey.route.start_spread(d_out.contiguous(), ctx.journey.patient)
        return d_out.new_zeros(0, d_out.shape[1]), None

"""The protocol of all dispatchers: `dispatch` brings tokens to their experts, `combine` brings results home."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from moe.dispatch.flow import (
    ROWS_NEED_GRAD,
    WEIGHTS_NEED_GRAD,
    CombineFinish,
    CombineStart,
    DispatchFinish,
    DispatchStart,
    Journey,
    Route,
)
from moe.dispatch.hop import Stage
from moe.dispatch.landing import lay_out
from moe.dispatch.wire import Call, Entries, go
from tokenring.transport import Traffic, connect, count_traffic

Result = TypeVar("Result")


@dataclass
class Dispatched:
    """Tokens at their experts."""

    tokens: Tensor
    """(M, H), expert by expert."""
    tokens_per_expert: Tensor
    """(E_local,) int64; adds up to M."""
    weights: Tensor
    """(M,), differentiable."""
    route: Route = field(repr=False)
    """How they came; `combine` goes back over it."""
    tie: Tensor = field(repr=False)
    """Makes the backward of dispatch run on every rank, tokens or none."""


class Pending(Generic[Result]):
    """What was started and is waited for once."""

    def __init__(self, finish: Callable[[], Result]) -> None:
        self._finish: Callable[[], Result] | None = finish

    def wait(self) -> Result:
        """The result."""
        if self._finish is None:
            raise ValueError("this was waited for before; keep what wait() gave")
        finish, self._finish = self._finish, None
        return finish()


@dataclass
class MoETraffic:
    """Bytes that left this rank; ranks are places in the EP x ETP block, ETP fastest."""

    ep_rank: int
    etp_rank: int
    etp: int
    by_ep: Traffic
    by_etp: Traffic

    @property
    def rows(self) -> dict[tuple[int, int], int]:
        """Rows of hidden states, of their gradients and of results: {(source, destination): bytes}."""
        return self._joined("sent")

    @property
    def metadata(self) -> dict[tuple[int, int], int]:
        """Notes, ids, weights and gradients of weights: {(source, destination): bytes}."""
        return self._joined("control")

    def _joined(self, kind: str) -> dict[tuple[int, int], int]:
        here = self.ep_rank * self.etp + self.etp_rank
        joined = {(here, to * self.etp + self.etp_rank): n for (_, to), n in getattr(self.by_ep, kind).items()}
        for (_, to), n in getattr(self.by_etp, kind).items():
            joined[(here, self.ep_rank * self.etp + to)] = n
        return joined


class Dispatcher:
    """What all dispatchers share; a subclass says through which stages rows go.

    Args:
        num_experts: E, over all ranks; the ranks of the EP group hold equal parts in order.
        ep_group: the ranks that experts are spread over; None: this rank holds all of them.
        etp_group: the ranks that hold parts of the same experts; None: experts are whole.
        align: rows of each expert are filled up with zeros to a multiple of this (grouped low-precision matmuls want 16 or
            more); nothing of it travels.
    """

    name = ""

    def __init__(self, *, num_experts: int, ep_group: Any = None, etp_group: Any = None, align: int = 1) -> None:
        self.ep, self.etp = connect(ep_group), connect(etp_group)
        self.num_experts = num_experts
        if num_experts < 1 or num_experts % self.ep.world:
            raise ValueError(
                f"num_experts={num_experts} cannot be spread evenly over {self.ep.world} ranks; give a multiple of that"
            )
        if align < 1:
            raise ValueError(f"align is {align}; give at least 1")
        self.local_experts = num_experts // self.ep.world
        self.first_expert = self.ep.rank * self.local_experts
        self.align = align
        self._groups = (ep_group, etp_group)

    def stages(self) -> list[Stage]:
        """Through which exchanges rows go, in order."""
        raise AssertionError("a dispatcher says what its stages are")

    # -- the two halves ----------------------------------------------------------------------------------------------

    def dispatch(self, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Dispatched:
        """Bring tokens to their experts. Collective over the EP x ETP block.

        Args:
            hidden: (T, H) floating point; T may differ from rank to rank and may be 0.
            expert_ids: (T, k) integers in [0, E), different in a row; -1: dropped.
            expert_weights: (T, k) floating point.

        Raises:
            ValueError: on every rank, before rows move, if one rank's arguments are wrong or the ranks' do not go together.
        """
        return self._dispatch(hidden, expert_ids, expert_weights, patient=True).wait()

    def start_dispatch(self, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Pending[Dispatched]:
        """Agree and post the rows of `dispatch`; its `wait()` gives the result.

        Between the two this rank may compute, and start others; every rank starts and waits in the same order. All rows are
        under way at once, which takes more memory than `dispatch`.
        """
        return self._dispatch(hidden, expert_ids, expert_weights, patient=False)

    def _dispatch(
        self, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor, *, patient: bool
    ) -> Pending[Dispatched]:
        route, laid, hidden, expert_weights = self.plan(hidden, expert_ids, expert_weights)
        journey = Journey(route, patient)
        with self._shared_fate():
            ticket = DispatchStart.apply(hidden, expert_weights, journey)

        def finish() -> Dispatched:
            with self._shared_fate():
                tokens, weights, tie = DispatchFinish.apply(ticket, laid, journey)
            return Dispatched(tokens, route.tokens_per_expert, weights, route, tie)

        return Pending(finish)

    def combine(self, expert_output: Tensor, dispatched: Dispatched, weighted: bool = False) -> Tensor:
        """Add up what the experts gave for each token, at the rank it is from. Collective.

        With ETP each rank gives the part of the output that its part of the expert makes; parts are added up.

        Args:
            expert_output: (M, H), in the order of `dispatched.tokens`.
            dispatched: what `dispatch` gave.
            weighted: whether the experts multiplied by `dispatched.weights` already.

        Returns:
            (T, H); zeros where all of a token's choices were dropped.
        """
        return self._combine(expert_output, dispatched, weighted, patient=True).wait()

    def start_combine(self, expert_output: Tensor, dispatched: Dispatched, weighted: bool = False) -> Pending[Tensor]:
        """Add up and post the rows of `combine`; its `wait()` gives the result. See `start_dispatch`."""
        return self._combine(expert_output, dispatched, weighted, patient=False)

    def _combine(
        self, expert_output: Tensor, dispatched: Dispatched, weighted: bool, *, patient: bool
    ) -> Pending[Tensor]:
        if expert_output.shape != dispatched.tokens.shape or expert_output.dtype != dispatched.tokens.dtype:
            error = ValueError(
                f"expert_output is {tuple(expert_output.shape)} {expert_output.dtype}; give what belongs to the dispatched "
                f"tokens: {tuple(dispatched.tokens.shape)} {dispatched.tokens.dtype}"
            )
            for transport in (self.ep, self.etp):
                transport.abandon(error)
            raise error
        journey, weights = Journey(dispatched.route, patient), None if weighted else dispatched.weights
        with self._shared_fate():
            ticket = CombineStart.apply(expert_output.contiguous(), weights, dispatched.tie, journey)

        def finish() -> Tensor:
            with self._shared_fate():
                return CombineFinish.apply(ticket, journey)

        return Pending(finish)

    def plan(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Route, Tensor, Tensor, Tensor]:
        """Agree on a route. Collective. Returns it, the weights in the experts' order, and hidden and weights to differentiate."""
        call = Call(self._text(hidden, ids, weights), ids.shape[-1] if ids.dim() else 1)
        call.refusal = self._refusal(hidden, ids, weights)
        recording = torch.is_grad_enabled()
        if call.refusal is None and recording:
            call.flags = ROWS_NEED_GRAD * hidden.requires_grad + WEIGHTS_NEED_GRAD * weights.requires_grad
        if call.refusal is None:
            first = (ids.reshape(-1) >= 0).nonzero().squeeze(1)
            row = torch.div(first, max(ids.shape[1], 1), rounding_mode="floor")
            held = Entries(hidden.shape[0], row, ids.reshape(-1)[first].long(), weights.detach().reshape(-1)[first])
        else:
            first = held = None
        hops = []
        for stage in self.stages():
            gone = go(stage, held, call)
            if gone is not None:
                hop, held = gone
                hops.append(hop)
        if call.refusal is not None:
            raise ValueError(call.refusal)
        came = hops[-1].received if hops else [held.num_rows]
        landing, laid, sizes = lay_out(held, came, self.first_expert, self.local_experts, self.align)
        route = Route(hops, first, tuple(ids.shape), landing, sizes, call.flags)
        if recording and not (hidden.requires_grad or weights.requires_grad):
            hidden = hidden.detach().requires_grad_()  # so that every rank's graph holds the same exchanges
        return route, laid, hidden, weights

    # -- counting ----------------------------------------------------------------------------------------------------

    @contextmanager
    def count_traffic(self) -> Iterator[MoETraffic]:
        """Count what leaves this rank inside the block: rows and metadata apart, in bytes."""
        ep_group, etp_group = self._groups
        with ExitStack() as stack:
            by_ep = stack.enter_context(count_traffic(self.ep if ep_group is not None else None))
            by_etp = stack.enter_context(count_traffic(self.etp if etp_group is not None else None))
            yield MoETraffic(self.ep.rank, self.etp.rank, self.etp.world, by_ep, by_etp)

    @contextmanager
    def _shared_fate(self) -> Iterator[None]:
        with self.ep.shared_fate(), self.etp.shared_fate():
            yield

    # -- checks ------------------------------------------------------------------------------------------------------

    def _text(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> str:
        mode = "recording" if torch.is_grad_enabled() else "no_grad"
        kinds = f"{str(hidden.dtype)[6:]} rows, {str(weights.dtype)[6:]} weights"
        return f"{self.name}: E={self.num_experts} H={hidden.shape[-1:].numel()} k={ids.shape[-1:].numel()}, {kinds}, {mode}"

    def _refusal(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> str | None:
        if hidden.dim() != 2 or not hidden.is_floating_point():
            return f"hidden is {tuple(hidden.shape)} {hidden.dtype}; give (T, H) in a floating-point dtype"
        if ids.dim() != 2 or ids.shape[0] != hidden.shape[0] or ids.is_floating_point() or ids.dtype == torch.bool:
            return f"expert_ids is {tuple(ids.shape)} {ids.dtype}; give ({hidden.shape[0]}, k) integers"
        if weights.shape != ids.shape or not weights.is_floating_point():
            return f"expert_weights is {tuple(weights.shape)} {weights.dtype}; give {tuple(ids.shape)} in a floating-point dtype"
        if not ids.numel():
            return None
        low, high = int(ids.min()), int(ids.max())
        if low < -1 or high >= self.num_experts:
            return (
                f"expert_ids reach from {low} to {high}; give 0 to {self.num_experts - 1}, or -1 for a dropped choice"
            )
        ordered = ids.sort(dim=1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            return "a row of expert_ids names one expert twice; give different experts in a row"
        return None

    def _all_peers(self) -> tuple[int, ...]:
        return tuple(range(self.ep.world))

    def _over_etp(self) -> list[Stage]:
        """Every row to all that hold parts of the same experts."""
        if self.etp.world == 1:
            return []
        peers = tuple(range(self.etp.world))
        return [Stage(self.etp, peers, "replicate", self.first_expert, self.local_experts)]

    def _over_ep(self, rule: str) -> list[Stage]:
        if self.ep.world == 1 and rule != "copies":
            return []
        return [Stage(self.ep, self._all_peers(), rule, 0, self.local_experts)]

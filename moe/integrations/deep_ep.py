"""DeepEP and HybridEP kernels behind our protocol, for GPUs that they support.

    build_dispatcher("deepep", num_experts=256, ep_group=group)
    build_dispatcher("hybridep", num_experts=256, ep_group=group, max_tokens=4096)

DeepEP brings one row a rank and leaves the copies for the experts to the receiver: they are laid out, weighted and added up here, as
for `dedup`. HybridEP brings rows expert by expert. Both run over the EP group alone: experts are whole (ETP 1).
Written for DeepEP's `Buffer` and its `HybridEPBuffer`, from their documented calls; tested against stand-ins with the same calls, on
no GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.dispatch.base import Dispatched, Pending
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
from moe.dispatch.landing import lay_out
from moe.dispatch.wire import Entries
from tokenring.transport import connect


@dataclass
class Handle:
    """What a kernel wants back for the way home, and the local part of a route."""

    kernel: Any
    local: Route | None = None


class _Kernels:
    """The two halves of `moe.dispatch.Dispatcher`, begun and ended at once: on GPUs the host does not wait for the kernels anyway."""

    etp = connect(None)
    """Experts are whole."""

    def start_dispatch(self, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Pending[Dispatched]:
        """As `moe.dispatch.Dispatcher.start_dispatch`."""
        sent = self.dispatch(hidden, expert_ids, expert_weights)
        return Pending(lambda: sent)

    def start_combine(self, expert_output: Tensor, dispatched: Dispatched, weighted: bool = False) -> Pending[Tensor]:
        """As `moe.dispatch.Dispatcher.start_combine`."""
        out = self.combine(expert_output, dispatched, weighted)
        return Pending(lambda: out)


class DeepEP(_Kernels):
    """DeepEP's normal kernels.

    Args:
        num_experts: E over all ranks.
        ep_group: a ProcessGroup on GPUs.
        etp_group: must be None or of one rank.
        align: as in `moe.build_dispatcher`.
        buffer: a `deep_ep.Buffer` to use; None: one is made for the rows of the first dispatch, and a larger one when they grow.
    """

    name = "deepep"

    def __init__(
        self, *, num_experts: int, ep_group: Any, etp_group: Any = None, align: int = 1, buffer: Any = None
    ) -> None:
        self.num_experts, self.align = num_experts, align
        self.local_experts = _local_experts(self.name, num_experts, ep_group, etp_group)
        self._group, self._buffer, self._own = ep_group, buffer, buffer is None
        self._row_bytes = 0
        if buffer is None:
            _package(self.name)

    def dispatch(self, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Dispatched:
        """As `moe.dispatch.Dispatcher.dispatch`; weights travel in float32."""
        buffer = self._for(hidden)
        handle = Handle(None)
        rows, weights, ids = _DeepDispatch.apply(
            hidden.contiguous(), expert_weights.float(), expert_ids, buffer, self.num_experts, handle
        )
        slots = (ids.reshape(-1) >= 0).nonzero().squeeze(1)
        row = torch.div(slots, ids.shape[1], rounding_mode="floor")
        held = Entries(rows.shape[0], row, ids.reshape(-1)[slots].long(), weights.detach().reshape(-1)[slots])
        landing, laid, sizes = lay_out(held, [rows.shape[0]], 0, self.local_experts, self.align)
        flags = ROWS_NEED_GRAD | WEIGHTS_NEED_GRAD
        handle.local = Route([], slots, tuple(ids.shape), landing, sizes, flags)
        journey = Journey(handle.local, patient=True)
        tokens, laid, tie = DispatchFinish.apply(DispatchStart.apply(rows, weights, journey), laid, journey)
        return Dispatched(tokens, sizes, laid, handle, tie)

    def combine(self, expert_output: Tensor, dispatched: Dispatched, weighted: bool = False) -> Tensor:
        """As `moe.dispatch.Dispatcher.combine`."""
        handle, weights = dispatched.route, None if weighted else dispatched.weights
        journey = Journey(handle.local, patient=True)
        ticket = CombineStart.apply(expert_output.contiguous(), weights, dispatched.tie, journey)
        return _DeepCombine.apply(CombineFinish.apply(ticket, journey), self._buffer, handle)

    def _for(self, hidden: Tensor) -> Any:
        """A buffer that is large enough."""
        size = hidden.shape[1] * max(hidden.element_size(), 2)
        if self._own and size > self._row_bytes:
            kind, ranks = _package(self.name).Buffer, self._group.size()
            configs = (kind.get_dispatch_config(ranks), kind.get_combine_config(ranks))
            near = max(config.get_nvl_buffer_size_hint(size, ranks) for config in configs)
            far = max(config.get_rdma_buffer_size_hint(size, ranks) for config in configs)
            self._buffer, self._row_bytes = kind(self._group, near, far), size
        return self._buffer


class _DeepDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weights: Tensor, ids: Tensor, buffer: Any, num_experts: int, handle: Handle
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.buffer, ctx.handle = buffer, handle
        per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, num_experts)
        rows, received_ids, received_weights, _, handle.kernel, _ = buffer.dispatch(
            hidden,
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )
        ctx.mark_non_differentiable(received_ids)
        return rows, received_weights, received_ids

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows: Tensor, d_weights: Tensor, d_ids: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weights, _ = ctx.buffer.combine(
            d_rows.contiguous(), ctx.handle.kernel, topk_weights=d_weights.float().contiguous()
        )
        return d_hidden, d_weights, None, None, None, None


class _DeepCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, buffer: Any, handle: Handle) -> Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(rows.contiguous(), handle.kernel)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, None, None]:
        return ctx.buffer.dispatch(d_out.contiguous(), handle=ctx.handle.kernel)[0], None, None


class HybridEP(_Kernels):
    """HybridEP's kernels, which bring rows expert by expert.

    Args:
        num_experts, ep_group, etp_group, align: as in `DeepEP`.
        max_tokens: the most tokens of a rank; fewer are filled up with rows that go nowhere, as the kernels want equal numbers.
        buffer: a `deep_ep.HybridEPBuffer` to use; None: one is made at the first dispatch.
    """

    name = "hybridep"

    def __init__(
        self,
        *,
        num_experts: int,
        ep_group: Any,
        etp_group: Any = None,
        align: int = 1,
        max_tokens: int,
        buffer: Any = None,
    ) -> None:
        self.num_experts, self.align, self.max_tokens = num_experts, align, max_tokens
        self.local_experts = _local_experts(self.name, num_experts, ep_group, etp_group)
        self._group, self._buffer = ep_group, buffer
        if buffer is None:
            _package(self.name)

    def dispatch(self, hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Dispatched:
        """As `moe.dispatch.Dispatcher.dispatch`."""
        missing = self.max_tokens - hidden.shape[0]
        if missing < 0:
            raise ValueError(f"hidden has {hidden.shape[0]} rows; max_tokens={self.max_tokens}: give a larger one")
        if self._buffer is None:
            self._buffer = _package(self.name).HybridEPBuffer(
                group=self._group,
                hidden_dim=hidden.shape[1],
                max_num_of_tokens_per_rank=self.max_tokens,
                num_local_experts=self.local_experts,
            )
        spare = torch.where(expert_ids < 0, self.num_experts, expert_ids)
        shape = (hidden.shape[0], self.num_experts + 1)
        probs = expert_weights.float().new_zeros(shape).scatter(1, spare, expert_weights.float())[:, :-1]
        chosen = torch.zeros(shape, dtype=torch.bool, device=hidden.device).scatter(1, spare, True)[:, :-1]
        hidden, probs, chosen = (torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (hidden, probs, chosen))
        handle = Handle(None)
        tokens, weights, counts = _HybridDispatch.apply(
            hidden.contiguous(), probs.contiguous(), chosen.contiguous(), self, handle
        )
        handle.local = shape[0]
        return Dispatched(tokens, counts, weights, handle, tokens.new_zeros(0))

    def combine(self, expert_output: Tensor, dispatched: Dispatched, weighted: bool = False) -> Tensor:
        """As `moe.dispatch.Dispatcher.combine`."""
        if not weighted:
            scaled = expert_output * dispatched.weights.unsqueeze(1)
            expert_output = scaled.to(expert_output.dtype)
        handle = dispatched.route
        return _HybridCombine.apply(expert_output.contiguous(), self, handle)[: handle.local]

    @property
    def filling(self) -> int | None:
        """`pad_multiple` of the kernels."""
        return self.align if self.align > 1 else None


class _HybridDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, probs: Tensor, chosen: Tensor, d: HybridEP, handle: Handle
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.d, ctx.handle = d, handle
        tokens, weights, _, counts, handle.kernel = d._buffer.dispatch_with_permute(
            hidden=hidden,
            routing_map=chosen,
            probs=probs,
            scaling_factor=None,
            num_of_experts_per_rank=d.local_experts,
            pad_multiple=d.filling,
        )
        ctx.mark_non_differentiable(counts)
        return tokens, weights, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, d_tokens: Tensor, d_weights: Tensor, d_counts: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_probs = ctx.d._buffer.combine_with_unpermute(
            hidden=d_tokens.contiguous(),
            probs=d_weights.contiguous(),
            handle=ctx.handle.kernel,
            pad_multiple=ctx.d.filling,
        )
        return d_hidden, d_probs, None, None, None


class _HybridCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, d: HybridEP, handle: Handle) -> Tensor:
        ctx.d, ctx.handle = d, handle
        return d._buffer.combine_with_unpermute(hidden=rows, handle=handle.kernel, pad_multiple=d.filling)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, None, None]:
        back = ctx.d._buffer.dispatch_with_permute(
            hidden=d_out.contiguous(), scaling_factor=None, handle=ctx.handle.kernel, pad_multiple=ctx.d.filling
        )
        return back[0], None, None


def _local_experts(name: str, num_experts: int, ep_group: Any, etp_group: Any) -> int:
    ranks = connect(ep_group).world
    if connect(etp_group).world > 1:
        raise ValueError(f"{name} runs over the EP group alone; give etp_group=None, or 'dedup' for ETP > 1")
    if num_experts % ranks:
        raise ValueError(
            f"num_experts={num_experts} cannot be spread evenly over {ranks} ranks; give a multiple of that"
        )
    return num_experts // ranks


def _package(name: str) -> Any:
    try:
        import deep_ep
    except ImportError as error:
        raise ValueError(
            f"dispatcher {name!r} needs the package deep_ep, which cannot be imported ({error}); give 'auto'"
        ) from error
    return deep_ep

"""A mixture-of-experts layer for plain torch: route, dispatch, experts, combine, with exchanges beside computing.

    y = sum over the k chosen experts of weight * expert(x)  [+ shared(x)]

With `chunks=m` the tokens of a rank go in m parts: while the experts work on one, the next is under way, and so in the
backward pass. Shared experts work while the first part travels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe.dispatch import build_dispatcher
from moe.dispatch.pipelined import through_experts
from moe.experts import Experts, SharedExperts
from moe.placement import Placement, sum_over_replicas
from moe.router import Router, Routing
from tokenring.transport import connect


class MoELayer(nn.Module):
    """Takes the place of a feed-forward network; every rank of the EP x ETP block calls it together.

    Args:
        hidden_size, ffn_size: H, and F of one expert.
        num_experts, topk: E over all ranks, and k.
        ep_group, etp_group: ranks that experts are spread over, and that hold parts of the same experts; None: one rank.
        sequence_group: ranks that hold parts of the same sequences (tensor and context parallel): what the router's losses and
            full-sequence dropping span.
        dispatcher: a name of `moe.build_dispatcher`.
        ranks_per_node, topology: as there.
        activation, backend: of the experts; see `moe.experts`.
        shared_ffn_size: F of shared experts; None: none. shared_gate: whether a gate of each token scales them.
        chunks: m; every rank must give the same.
        placement: which expert is in which slot of which rank, replicas too (`moe.placement`); None: experts in order, once each.
            With replicas call `sum_replica_gradients` before each optimiser step.
        router: options of `moe.RouterConfig`.

    Gradients of the router and the shared experts are this rank's share, to be summed over all ranks that call the layer; those of
    the experts are whole up to data parallel copies (EDP), and up to parts of the output with ETP.

    >>> layer = MoELayer(8, 16, num_experts=4, topk=2)
    >>> layer(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        num_experts: int,
        topk: int,
        *,
        ep_group: Any = None,
        etp_group: Any = None,
        sequence_group: Any = None,
        dispatcher: str = "auto",
        ranks_per_node: int | None = None,
        topology: Any = None,
        activation: str = "swiglu",
        backend: str = "auto",
        shared_ffn_size: int | None = None,
        shared_gate: bool = False,
        chunks: int = 1,
        placement: Placement | None = None,
        router: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if chunks < 1:
            raise ValueError(f"chunks is {chunks}; give at least 1")
        if placement is not None and placement.num_experts != num_experts:
            raise ValueError(
                f"placement is for {placement.num_experts} experts; give one for num_experts={num_experts}"
            )
        self.chunks, self.placement = chunks, placement
        self.router = Router(hidden_size, num_experts, topk, group=sequence_group, **(router or {})).to(device)
        self.dispatcher = build_dispatcher(
            dispatcher,
            num_experts=num_experts if placement is None else len(placement.slots),
            ep_group=ep_group,
            etp_group=etp_group,
            ranks_per_node=ranks_per_node,
            topology=topology,
        )
        etp = self.dispatcher.etp
        kind = {"activation": activation, "dtype": dtype, "device": device}
        self.experts = Experts(
            hidden_size,
            ffn_size,
            self.dispatcher.local_experts,
            etp=etp.world,
            etp_rank=etp.rank,
            backend=backend,
            **kind,
        )
        self._ep = connect(ep_group)
        if placement is not None and placement.ranks != self._ep.world:
            raise ValueError(f"placement is for {placement.ranks} ranks; the EP group has {self._ep.world}")
        self.shared = None
        if shared_ffn_size is not None:
            self.shared = SharedExperts(hidden_size, shared_ffn_size, gate=shared_gate, **kind)

    def forward(
        self, hidden: Tensor, *, return_routing: bool = False, **given: Tensor
    ) -> Tensor | tuple[Tensor, Routing]:
        """(B, S, H), or (T, H) -> the same shape.

        Args:
            hidden: this rank's tokens; their number may differ from rank to rank and may be 0. A (B, S, H) tensor counts as B
                sequences unless `sequences` says otherwise.
            return_routing: give (out, routing) and leave the router's losses to the caller. Otherwise their gradients join the
                backward pass as if they had been added to the model's loss.
            given: `sequences`, `positions`, `padding` for the router, one entry a token, in any shape of T elements.
        """
        tokens = hidden.reshape(-1, hidden.shape[-1])
        given = {name: value.reshape(-1) for name, value in given.items() if value is not None}
        if hidden.dim() == 3 and "sequences" not in given:
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            given["sequences"] = rows.repeat_interleave(hidden.shape[1])
        routing = self.router(tokens, **given)
        weights = routing.expert_weights if return_routing else routing.attached_weights()
        ids = routing.expert_ids
        if self.placement is not None:
            ids = self.placement.to_slots(ids, self._ep.rank)
        out = through_experts(
            self.dispatcher,
            lambda sent: self.experts(sent.tokens, sent.tokens_per_expert),
            tokens,
            ids,
            weights,
            chunks=self.chunks,
            beside=self.shared,
        ).view_as(hidden)
        return (out, routing) if return_routing else out

    def sum_replica_gradients(self) -> None:
        """Collective over the EP group: replicas of an expert get the sum of their gradients, alike on all ranks."""
        if self.placement is not None:
            sum_over_replicas(self.experts.parameters(), self.placement, self._ep)

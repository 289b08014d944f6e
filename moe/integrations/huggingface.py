"""Experts of transformers' models spread over ranks, with our dispatchers between.

    expert_parallel(model, group, dispatcher="dedup")                     a model that is loaded already; any group

    register()                                                            through transformers' own expert parallelism:
    DistributedConfig(ep_size=4, ep_implementation="moe:dedup")           transformers shards, ours exchanges

Both take every model whose experts are one module with three-dimensional `down_proj` and `gate_up_proj` or `up_proj`
(Qwen3-MoE, Mixtral, DeepSeek, gpt-oss and their kind), and leave routers, shared experts and the experts' own forward alone, so
biases, clamps and activations stay the model's. Written for transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from moe.dispatch import DISPATCHERS, Dispatched, Dispatcher, build_dispatcher
from moe.dispatch.pipelined import through_experts
from moe.integrations.huggingface_parts import ADDED_ONCE, HeldPart, part_of_experts
from tokenring.transport import Transport, connect

__all__ = ["DispatcherEP", "SpreadExperts", "expert_modules", "expert_parallel", "register"]


def _held(module: nn.Module) -> HeldPart:
    return getattr(module, "_held_part", HeldPart(0, module.num_experts))


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold all experts of a layer as three-dimensional parameters, by name."""
    found = {}
    for name, module in model.named_modules():
        down = getattr(module, "down_proj", None)
        if isinstance(down, nn.Parameter) and down.dim() == 3 and hasattr(module, "num_experts"):
            found[name] = module
    return found


def expert_parallel(
    model: nn.Module,
    group: Any,
    *,
    etp_group: Any = None,
    dispatcher: str = "auto",
    chunks: int = 1,
    **options: Any,
) -> nn.Module:
    """Keep only this rank's experts in a model, and bring tokens to theirs. Collective over the groups at the first forward.

    Every rank runs the model on tokens of its own, as many as it has; gradients of experts are then sums over all tokens of the
    block, those of all other parameters are to be summed or averaged over it as in data parallelism.

    Args:
        model: with whole experts on every rank, or those that `load_own_experts` read for it; it is changed and returned.
        group: the EP group; None: one rank.
        etp_group: ranks that hold parts of the same experts; None: experts stay whole.
        dispatcher, options: as in `moe.build_dispatcher`.
        chunks: as in `moe.MoELayer`.
    """
    modules = expert_modules(model)
    if not modules:
        raise ValueError(
            f"{type(model).__name__} holds no experts as one module with a three-dimensional down_proj; "
            "give a mixture-of-experts model of transformers"
        )
    for name, module in modules.items():
        if getattr(module, "_is_expert_parallel", False):
            raise ValueError(f"experts of {name} are spread already; call expert_parallel once")
        d = build_dispatcher(
            dispatcher, num_experts=_held(module).whole, ep_group=group, etp_group=etp_group, **options
        )
        SpreadExperts(module, d, chunks)
    return model


class SpreadExperts:
    """Stands in for the forward of an experts module, which is left with this rank's part of the weights.

    Args:
        module: one of `expert_modules`; it is changed.
        dispatcher: of as many experts as it holds; says which of them, and which part of each, stay here.
        chunks: as in `moe.MoELayer`.
        observe: told (E_local,) int64 at every forward: how many tokens came to each expert; once for each chunk.
    """

    def __init__(
        self,
        module: nn.Module,
        dispatcher: Dispatcher,
        chunks: int = 1,
        observe: Callable[[Tensor], None] | None = None,
    ) -> None:
        if chunks < 1:
            raise ValueError(f"chunks is {chunks}; give at least 1")
        self.dispatcher, self.chunks, self.observe = dispatcher, chunks, observe
        _keep_local(module, dispatcher)
        self._experts = module.forward
        module.forward = self

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, k), (T, k) -> (T, H)."""
        return _through(
            self.dispatcher, self._experts, hidden_states, top_k_index, top_k_weights, self.chunks, self.observe
        )


def _keep_local(module: nn.Module, d: Dispatcher) -> None:
    """Cut every parameter of the experts held to this rank's experts, and to its part of each."""
    held, here, etp = _held(module), module.num_experts, d.etp.world
    first = d.first_expert - held.first
    if held.whole != d.num_experts or first < 0 or first + d.local_experts > here:
        raise ValueError(
            f"{type(module).__name__} holds experts {held.first} to {held.first + here - 1} of {held.whole}; this rank needs "
            f"{d.first_expert} to {d.first_expert + d.local_experts - 1} of {d.num_experts}: load those"
        )
    if held.etp > 1 and (held.etp, held.etp_rank) != (etp, d.etp.rank):
        raise ValueError(
            f"{type(module).__name__} holds part {held.etp_rank} of {held.etp} of its experts; this rank needs part "
            f"{d.etp.rank} of {etp}: load that, or whole experts"
        )
    mine, cut = slice(first, first + d.local_experts), etp // held.etp
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.shape[0] == here:
            kept = part_of_experts(module, name, parameter.detach()[mine], cut, d.etp.rank)
            if kept.shape != parameter.shape or not isinstance(getattr(module, "_held_part", None), HeldPart):
                kept = kept.clone()  # what was loaded for this rank alone needs no copy
            learns = parameter.requires_grad and (name != ADDED_ONCE or d.etp.rank == 0)
            setattr(module, name, nn.Parameter(kept, requires_grad=learns))
    module.num_experts = d.local_experts
    module._is_expert_parallel = True


def _through(
    d: Dispatcher,
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    chunks: int = 1,
    observe: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Dispatch, the model's own experts on one expert a row, combine."""

    def local(sent: Dispatched) -> Tensor:
        rows, counts = sent.tokens, sent.tokens_per_expert
        if observe is not None:
            observe(counts)
        # some forwards refuse no rows at all, and every parameter must stay in the graph
        filler = 0 if rows.shape[0] else 1
        if filler:
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
            counts = counts.clone()
            counts[0] += 1
        ids = torch.arange(counts.numel(), device=rows.device).repeat_interleave(counts.to(rows.device)).unsqueeze(1)
        out = experts(rows, ids, torch.ones_like(ids, dtype=top_k_weights.dtype)).to(hidden_states.dtype)
        return out[filler:]

    return through_experts(d, local, hidden_states, top_k_index, top_k_weights, chunks=chunks)


class DispatcherEP(EPImplementation):
    """What transformers builds for one experts module under `ep_implementation="moe:NAME"`.

    Ranks of a tensor parallel group hold the same tokens; each sends its part of them, and the results are gathered again.
    """

    dispatcher = "auto"
    """A name of `moe.build_dispatcher`."""

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        everything = self.num_local_experts * ep_mesh.size()
        self._dispatcher = build_dispatcher(self.dispatcher, num_experts=everything, ep_group=ep_mesh)
        self._tp = connect(tp_mesh)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, k), (T, k) -> (T, H)."""
        sizes = [len(part) for part in torch.arange(hidden_states.shape[0]).tensor_split(self._tp.world)]
        if self._tp.world > 1:
            hidden_states, top_k_weights = (_Part.apply(x, self._tp, sizes) for x in (hidden_states, top_k_weights))
            top_k_index = top_k_index.split(sizes)[self._tp.rank]
        out = _through(self._dispatcher, self.experts_forward, hidden_states, top_k_index, top_k_weights)
        return _Whole.apply(out, self._tp, sizes) if self._tp.world > 1 else out


def register() -> None:
    """Make "moe:dedup", "moe:auto", and so on known to transformers' `DistributedConfig(ep_implementation=...)`."""
    for name in DISPATCHERS:
        EPImplementationInterface.register(f"moe:{name}", type(f"{name}EP", (DispatcherEP,), {"dispatcher": name}))


class _Part(torch.autograd.Function):
    """This rank's rows of what all ranks hold alike; gradients of all rows come back."""

    @staticmethod
    def forward(ctx, x: Tensor, tp: Transport, sizes: list[int]) -> Tensor:
        ctx.tp = tp
        return x.split(sizes)[tp.rank].clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return torch.cat(ctx.tp.all_gather(grad.contiguous())), None, None


class _Whole(torch.autograd.Function):
    """All ranks' rows on every rank; the gradient, alike on all ranks, goes to the rank a row is from."""

    @staticmethod
    def forward(ctx, x: Tensor, tp: Transport, sizes: list[int]) -> Tensor:
        ctx.tp, ctx.sizes = tp, sizes
        return torch.cat(tp.all_gather(x.contiguous()))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.split(ctx.sizes)[ctx.tp.rank].contiguous(), None, None

"""Experts of transformers' models spread over ranks, with our dispatchers between.

    expert_parallel(model, group, dispatcher="dedup")                     a model that is loaded already; any group

    register()                                                            through transformers' own expert parallelism:
    DistributedConfig(ep_size=4, ep_implementation="moe:dedup")           transformers shards, ours exchanges

Both take every model whose experts are one module with three-dimensional `down_proj` and `gate_up_proj` or `up_proj`
(Qwen3-MoE, Mixtral, DeepSeek, gpt-oss and their kind), and leave routers, shared experts and the experts' own forward alone, so
biases, clamps and activations stay the model's. Written for transformers 5.23.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from moe.dispatch import DISPATCHERS, Dispatcher, build_dispatcher
from tokenring.transport import Transport, connect

__all__ = ["DispatcherEP", "expert_modules", "expert_parallel", "register"]


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold all experts of a layer as three-dimensional parameters, by name."""
    found = {}
    for name, module in model.named_modules():
        down = getattr(module, "down_proj", None)
        if isinstance(down, nn.Parameter) and down.dim() == 3 and hasattr(module, "num_experts"):
            found[name] = module
    return found


def expert_parallel(model: nn.Module, group: Any, *, dispatcher: str = "auto", **options: Any) -> nn.Module:
    """Keep only this rank's experts in a model, and bring tokens to theirs. Collective over the group at the first forward.

    Every rank runs the model on tokens of its own, as many as it has; gradients of experts are then sums over all tokens of the
    group, those of all other parameters are to be summed or averaged over it as in data parallelism.

    Args:
        model: with whole experts on every rank; it is changed and returned.
        group: the EP group; None: one rank.
        dispatcher, options: as in `moe.build_dispatcher`.
    """
    modules = expert_modules(model)
    if not modules:
        raise ValueError(
            f"{type(model).__name__} holds no experts as one module with a three-dimensional down_proj; "
            "give a mixture-of-experts model of transformers"
        )
    transport = connect(group)
    for name, module in modules.items():
        if getattr(module, "_is_expert_parallel", False):
            raise ValueError(f"experts of {name} are spread already; call expert_parallel once")
        d = build_dispatcher(dispatcher, num_experts=module.num_experts, ep_group=group, **options)
        _keep_local(module, transport)
        forward = module.forward
        module.forward = partial(_through, d, forward)
    return model


def _keep_local(module: nn.Module, transport: Transport) -> None:
    """Cut every parameter of whole experts to this rank's."""
    whole = module.num_experts
    local = whole // transport.world
    mine = slice(transport.rank * local, (transport.rank + 1) * local)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.shape[0] == whole:
            kept = nn.Parameter(parameter.detach()[mine].clone(), requires_grad=parameter.requires_grad)
            setattr(module, name, kept)
    module.num_experts = local
    module._is_expert_parallel = True


def _through(d: Dispatcher, experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Dispatch, the model's own experts on one expert a row, combine."""
    sent = d.dispatch(hidden_states, top_k_index, top_k_weights)
    rows, counts = sent.tokens, sent.tokens_per_expert
    filler = (
        0 if rows.shape[0] else 1
    )  # some forwards refuse no rows at all, and every parameter must stay in the graph
    if filler:
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        counts = counts.clone()
        counts[0] += 1
    ids = torch.arange(counts.numel(), device=rows.device).repeat_interleave(counts.to(rows.device)).unsqueeze(1)
    out = experts(rows, ids, torch.ones_like(ids, dtype=top_k_weights.dtype)).to(hidden_states.dtype)
    return d.combine(out[filler:], sent)


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

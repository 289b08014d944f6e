"""Dense feed-forward networks become mixtures of identical experts.

    y = sum_k w_k mlp(x) = mlp(x), as the k weights of a token add up to 1

So with any router, dispatcher and folding the model computes what it did: a start for training (Sparse Upcycling, arXiv
2212.05055), and an end-to-end proof of everything between router and combine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe.layer import MoELayer


class UpcycledMLP(MoELayer):
    """A MoELayer in the place of a gated MLP; built by `upcycle_mlp`."""


def upcycle_mlp(
    mlp: nn.Module, num_experts: int, topk: int, *, seed: int = 0, noise: float = 0.0, **options: Any
) -> UpcycledMLP:
    """E experts that are copies of a gated MLP behind a random router.

    Args:
        mlp: with linear maps `gate_proj`, `up_proj`, `down_proj` without biases and silu or gelu between them, as in the models of
            the Llama, Qwen and Mistral families.
        num_experts, topk: E and k.
        seed: of the router's weights, and of the noise; give the same on every rank.
        noise: each expert's weights are multiplied by 1 + noise * N(0, 1), so that training tells them apart; 0: exact copies.
        options: of `MoELayer` (groups, dispatcher, chunks, ...).

    >>> mlp = nn.Module()
    >>> mlp.gate_proj, mlp.up_proj, mlp.down_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
    >>> mlp.act_fn = nn.SiLU()
    >>> x = torch.randn(1, 3, 8)
    >>> torch.allclose(upcycle_mlp(mlp, 4, 2)(x), mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)), atol=1e-6)
    True
    """
    maps = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(m, nn.Linear) and m.bias is None for m in maps):
        raise ValueError(
            f"{type(mlp).__name__} has no gate_proj, up_proj and down_proj without biases; give a gated MLP, or build a MoELayer"
        )
    gate, up, down = (m.weight.detach().T for m in maps)
    layer = UpcycledMLP(
        up.shape[0],
        up.shape[1],
        num_experts,
        topk,
        activation=_activation(mlp),
        dtype=up.dtype,
        device=up.device,
        **options,
    )
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_experts, up.shape[0], generator=draw)
    layer.router.weight.data = weight.to(layer.router.weight)
    held = range(layer.dispatcher.first_expert, layer.dispatcher.first_expert + layer.dispatcher.local_experts)
    slots = range(layer.dispatcher.num_experts) if layer.placement is None else layer.placement.slots
    experts = [slots[slot] for slot in held]

    def copies(x: Tensor, part: int) -> Tensor:
        if not noise:
            return x.expand(len(experts), *x.shape)
        parts = []
        for expert in experts:
            own = torch.Generator().manual_seed(seed * 1_000_003 + 3 * expert + part + 1)
            parts.append(x * (1 + noise * torch.randn(x.shape, generator=own)).to(x))
        return torch.stack(parts)

    layer.experts.load(copies(up, 0), copies(down, 1), copies(gate, 2))
    return layer


def upcycle(model: nn.Module, num_experts: int, topk: int, *, seed: int = 0, **options: Any) -> nn.Module:
    """Replace every gated MLP of a model by `upcycle_mlp` of it, each with a router of its own; the model is changed and returned."""
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if all(isinstance(getattr(child, part, None), nn.Linear) for part in ("gate_proj", "up_proj", "down_proj"))
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no MLP with gate_proj, up_proj and down_proj; nothing to upcycle"
        )
    for number, (parent, name) in enumerate(found):
        layer = upcycle_mlp(getattr(parent, name), num_experts, topk, seed=seed + number, **options)
        setattr(parent, name, layer)
    return model


def _activation(mlp: nn.Module) -> str:
    """The name of the experts' activation that is the MLP's."""
    act = getattr(mlp, "act_fn", None)
    x = torch.linspace(-3, 3, 7)
    if act is not None:
        for name, known in (("swiglu", nn.functional.silu), ("geglu", nn.functional.gelu)):
            if torch.allclose(act(x), known(x), atol=1e-6):
                return name
    raise ValueError(f"the activation between gate_proj and down_proj is {act!r}; experts know silu and exact gelu")

"""The experts of a transformers model over the ranks of a run; routers, and the experts' own arithmetic, stay the model's."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from launch.models.expert_block import ExpertBlock, at_work
from moe import build_dispatcher
from moe.dispatch import Dispatcher


class HeldExperts:
    """The experts of one layer, of which this rank keeps its own. Every rank of the block runs the layer together.

    Args:
        module: transformers' module of whole experts; it is changed.
        block: sizes and groups.
        keep_whole: whether `alone` will be used.
    """

    def __init__(self, module: nn.Module, block: ExpertBlock, keep_whole: bool) -> None:
        from moe.integrations.huggingface import SpreadExperts

        self.module, self.whole = module, _twin(module) if keep_whole else None
        self.sender: Dispatcher = build_dispatcher(
            block.dispatcher,
            num_experts=block.experts,
            ep_group=block.ep_group,
            etp_group=block.etp_group,
            ranks_per_node=block.ranks_per_node,
            topology=block.topology,
        )
        self.prefill_tokens = torch.zeros(self.sender.local_experts, dtype=torch.int64)
        """(E_local,): tokens that came to each expert held here in the first pass, the prefill."""
        self._parts_of_prefill = block.chunks
        self.spread = SpreadExperts(module, self.sender, block.chunks, self._count)

    @property
    def dispatcher(self) -> Dispatcher:
        """The dispatcher at work."""
        return at_work(self.sender)

    def _count(self, per_expert: Tensor) -> None:
        if self._parts_of_prefill:
            self.prefill_tokens += per_expert.cpu()
            self._parts_of_prefill -= 1


def spread(model: nn.Module, block: ExpertBlock, keep_whole: bool) -> list[HeldExperts]:
    """Leave every experts module of a model with this rank's own; none where the model has none."""
    from moe.integrations.huggingface import expert_modules

    return [HeldExperts(module, block, keep_whole) for module in expert_modules(model).values()]


@contextmanager
def alone(layers: Sequence[HeldExperts]) -> Iterator[None]:
    """Inside, whole experts run, on this rank only."""
    if any(layer.whole is None for layer in layers):
        raise ValueError("the whole experts are gone; spread them with keep_whole=True")
    for layer in layers:
        layer.module.forward = layer.whole.forward
    try:
        yield
    finally:
        for layer in layers:
            layer.module.forward = layer.spread


def _twin(module: nn.Module) -> nn.Module:
    """A module with the same parameters, which stay when those of the first are replaced."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    return twin

"""A dense feed-forward network upcycled to experts that are all copies of it (Sparse Upcycling, arXiv 2212.05055, section 3).

    y = sum over the k chosen experts e of w_e f_e(x) / sum of w_e = f(x)        where every f_e is f

So whatever the router draws, wherever the experts live and however tokens travel, the output must be the dense network's: an
oracle for the whole way of a token, at any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from launch.models.expert_block import ExpertBlock, at_work
from moe import MoELayer
from moe.dispatch import Dispatcher


class SpreadLayer(nn.Module):
    """One feed-forward network as E experts, of which this rank holds its own. Every rank of the block calls it together.

    Args:
        mlp: the dense network: `gate_proj`, `up_proj` and `down_proj` without biases, SiLU between.
        block: sizes and groups.
        random: draws the router's weights from Normal(0, 1 / H); every rank gives one in the same state.
        keep_dense: whether `alone` will be used.
    """

    def __init__(self, mlp: Any, block: ExpertBlock, random: torch.Generator, keep_dense: bool) -> None:
        super().__init__()
        up, gate, down = mlp.up_proj.weight, mlp.gate_proj.weight, mlp.down_proj.weight
        ffn, hidden = up.shape
        self.layer = MoELayer(
            hidden,
            ffn,
            block.experts,
            block.topk,
            ep_group=block.ep_group,
            etp_group=block.etp_group,
            dispatcher=block.dispatcher,
            ranks_per_node=block.ranks_per_node,
            topology=block.topology,
            chunks=block.chunks,
            dtype=up.dtype,
            device="meta",  # nothing is drawn that the dense weights replace
        ).to_empty(device=up.device)
        for buffer in self.layer.buffers():
            buffer.zero_()
        local = self.layer.dispatcher.local_experts
        self.layer.experts.load(*(whole.T.expand(local, -1, -1) for whole in (up, down, gate)))
        draw = torch.randn(block.experts, hidden, generator=random) / hidden**0.5
        self.layer.router.weight.data.copy_(draw)
        self.layer.eval().requires_grad_(False)
        self.dense = mlp if keep_dense else None
        self.is_alone = False
        self.prefill_tokens = torch.zeros(local, dtype=torch.int64)
        """(E_local,): tokens that came to each expert held here in the first pass, the prefill."""
        self._passes = 0
        self.layer.experts.register_forward_pre_hook(self._count)

    def forward(self, x: Tensor) -> Tensor:
        """(1, S, H) -> (1, S, H); S may differ from rank to rank and may be 0.

        A token written later lies on every rank. Each sends its own copy: the same experts' weights are read once for all
        copies, and no result has to be handed round.
        """
        if self.is_alone:
            return self.dense(x)
        out, routing = self.layer(x, return_routing=True)
        self._passes += 1
        share = routing.expert_weights.sum(dim=-1).view(*x.shape[:-1], 1)  # 1, but with k = 1 the score itself
        return (out / share).to(x.dtype)

    @property
    def sender(self) -> Dispatcher:
        """What was built for the layer."""
        return self.layer.dispatcher

    @property
    def dispatcher(self) -> Dispatcher:
        """The dispatcher at work."""
        return at_work(self.sender)

    def _count(self, experts: nn.Module, given: tuple[Tensor, Tensor]) -> None:
        if self._passes == 0:
            self.prefill_tokens += given[1].cpu()


def upcycle(decoder: Any, block: ExpertBlock, keep_dense: bool) -> list[SpreadLayer]:
    """Put experts in the place of `mlp` in each layer of a decoder."""
    layers, random = [], torch.Generator().manual_seed(block.seed)
    for layer in decoder.layers:
        layer.mlp = SpreadLayer(layer.mlp, block, random, keep_dense)
        layers.append(layer.mlp)
    return layers


@contextmanager
def alone(layers: Sequence[SpreadLayer]) -> Iterator[None]:
    """Inside, the dense networks run, on this rank only."""
    if any(layer.dense is None for layer in layers):
        raise ValueError("the dense networks are gone; spread the experts with keep_dense=True")
    for layer in layers:
        layer.is_alone = True
    try:
        yield
    finally:
        for layer in layers:
            layer.is_alone = False

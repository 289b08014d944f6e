"""Other libraries' ways of dispatch and combine, with the same experts chosen: what `moe_dispatch.py` runs beside ours.

Megatron-Core's dispatchers expect a GPU. Here, and only here, four CUDA calls are answered on the CPU, and split sizes become
lists (`cpu_shim`); their code is untouched. Megatron-Core 0.16.1's alltoall refuses uneven gloo gathers, so ETP stays 1.

DeepSpeed's layer pads every expert to the busiest one's tokens; its own gate is replaced by one that gives the benchmark's
choices, nothing dropped. It multiplies by gates, which are ones here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

MEGATRON = ("megatron alltoall", "megatron allgather")
DEEPSPEED = "deepspeed"


def rivals(
    group: dist.ProcessGroup, options: argparse.Namespace, alone: dist.ProcessGroup
) -> dict[str, Callable[..., Tensor]]:
    """Those that can be imported. Collective."""
    found = {}
    if find_spec("megatron") is not None:
        cpu_shim()
        found |= {name: megatron(name.split()[1], group, options, alone) for name in MEGATRON}
    if find_spec("deepspeed") is not None:
        found[DEEPSPEED] = deepspeed(group, options)
    return found


def cpu_shim() -> None:
    """Answer the CUDA calls on the way of Megatron-Core's dispatchers, and turn its split sizes into lists."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import token_dispatcher

    class Stream:
        def wait_stream(self, other: object) -> None: ...

        def synchronize(self) -> None: ...

        def record_event(self) -> Stream:
            return self

    plain = mappings.all_to_all

    def all_to_all(group: object, x: Tensor, output_splits: object = None, input_splits: object = None) -> Tensor:
        as_list = [s.tolist() if isinstance(s, Tensor) else s for s in (output_splits, input_splits)]
        return plain(group, x, *as_list)

    parallel_state._set_global_memory_buffer()
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.Stream = Stream
    torch.cuda.current_stream = Stream
    torch.cuda.stream = lambda stream: nullcontext()
    token_dispatcher.all_to_all = all_to_all


def megatron(
    name: str, group: dist.ProcessGroup, options: argparse.Namespace, alone: dist.ProcessGroup
) -> Callable[..., Tensor]:
    """One of Megatron-Core's dispatchers on the whole group as EP."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import token_dispatcher as theirs
    from megatron.core.transformer.transformer_config import TransformerConfig

    kind = {"alltoall": theirs.MoEAlltoAllTokenDispatcher, "allgather": theirs.MoEAllGatherTokenDispatcher}[name]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=options.hidden,
        num_attention_heads=1,
        num_moe_experts=options.experts,
        moe_router_topk=options.topk,
        expert_model_parallel_size=group.size(),
        add_bias_linear=False,
    )
    pgs = ProcessGroupCollection()
    pgs.ep, pgs.expt_tp, pgs.tp_ep, pgs.tp = group, alone, group, alone
    local = options.experts // group.size()
    mine = list(range(group.rank() * local, (group.rank() + 1) * local))
    d = kind(local, mine, config=config, pg_collection=pgs)

    def step(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        probs = hidden.new_zeros(hidden.shape[0], options.experts).scatter(1, ids, weights)
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(1, ids, True)
        tokens, probs = d.token_dispatch(*d.dispatch_preprocess(hidden.unsqueeze(1), chosen, probs))
        tokens, _, _ = d.dispatch_postprocess(tokens, probs)
        return d.combine_postprocess(d.token_combine(d.combine_preprocess(tokens))).squeeze(1)

    return step


def deepspeed(group: dist.ProcessGroup, options: argparse.Namespace) -> Callable[..., Tensor]:
    """DeepSpeed's layer of experts on the whole group as EP, experts the identity."""
    import deepspeed.comm
    from deepspeed.moe.sharded_moe import MOELayer

    deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)

    class Chosen(torch.nn.Module):
        """Stands for DeepSpeed's gate: the choices given, as many places for each expert as the busiest has tokens."""

        def forward(self, x: Tensor, ids: Tensor, *rest: object) -> tuple:
            hot = torch.zeros(x.shape[0], options.experts, dtype=torch.int64).scatter_(1, ids, 1)
            counts = hot.sum(0)
            capacity = counts.max()
            dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=group)
            places = (hot.cumsum(0) - 1).gather(1, ids)
            gates = torch.ones(ids.shape).T
            return torch.zeros(()), capacity, options.experts, ids.T.int(), places.T.int(), gates, counts

    layer = MOELayer(Chosen(), torch.nn.Identity(), "ep", group.size(), options.experts // group.size())
    layer.ep_group = group

    def step(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return layer(hidden, ids)

    return step

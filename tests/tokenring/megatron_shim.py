"""Lets unchanged Megatron-Core run on CPUs: it asks for CUDA devices, pinned memory and CUDA random states by name.

Import Megatron through this module first: `torch.compile`, which Megatron puts around small functions when it is imported,
is left out, as it would start a compiler in every worker.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_NAMES_USED = [0]


def _uncompiled(function: Any = None, **_: Any) -> Any:
    return function if callable(function) else lambda inner: inner


with mock.patch.object(torch, "compile", _uncompiled), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer import multi_latent_attention, multi_token_prediction, spec_utils
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
    from megatron.core.utils import get_batch_on_this_cp_rank

__all__ = [
    "AttnBackend",
    "AttnMaskType",
    "GPTModel",
    "MLATransformerConfig",
    "PackedSeqParams",
    "ProcessGroupCollection",
    "TransformerConfig",
    "gpt_layer_specs",
    "megatron_on_cpu",
    "model_parallel",
    "multi_token_prediction",
    "own_cut",
    "parallel_state",
    "spec_utils",
]


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Inside the block every CUDA device that Megatron names is the CPU."""
    made = torch.tensor

    def tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return made(*args, **kwargs)

    nothing = torch.empty(0, dtype=torch.uint8)
    with contextlib.ExitStack() as undo:
        for target, name, value in (
            (torch, "tensor", tensor),
            (torch.Tensor, "cuda", lambda self, *args, **kwargs: self),
            (torch.cuda, "current_device", lambda: "cpu"),
            (multi_latent_attention, "HAVE_TE", False),  # it is only half there without Transformer Engine
            (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: nothing),
            (megatron_random, "_set_cuda_rng_state", lambda *args, **kwargs: None),
            (megatron_random.CudaRNGStatesTracker, "fork", lambda self, name="": contextlib.nullcontext()),
        ):
            undo.enter_context(mock.patch.object(target, name, value))
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def model_parallel(group: dist.ProcessGroup, **sizes: Any) -> Iterator[None]:
    """Megatron's global groups over the ranks of `group`, which stands for the whole job; all gone when the block ends."""
    gc.collect()  # the last block's model, whose cycles hold its groups' connections open
    whole, made = dist.group.WORLD, []
    make = dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        made.append(make(*args, **kwargs))
        return made[-1]

    count = distributed_c10d._world.group_count
    distributed_c10d._update_default_pg(group)
    distributed_c10d._world.group_count = _agreed_count(group)
    try:
        with mock.patch.object(dist, "new_group", new_group):
            parallel_state.initialize_model_parallel(create_gloo_process_groups=False, **sizes)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        for each in made:
            if each is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(each)
        distributed_c10d._update_default_pg(whole)
        distributed_c10d._world.group_count = count


def _agreed_count(group: dist.ProcessGroup) -> int:
    """Where the names of new groups count from: the same on all members, whatever groups each has been in, and never used."""
    used = torch.tensor([_NAMES_USED[0]])
    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
    _NAMES_USED[0] = int(used) + 1
    return 100_000 + 1_000 * _NAMES_USED[0]


def own_cut(batch: dict[str, torch.Tensor], group: Any) -> dict[str, torch.Tensor]:
    """This rank's part of (B, S) tensors, cut by Megatron's own function."""
    newer = {"is_hybrid_cp": False} if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters else {}
    return get_batch_on_this_cp_rank(dict(batch), cp_group=group, **newer)

"""Who takes part in `attention_cpu.py`: one process alone, this library, and its peers, each by its own documented call.

Every function gives a call that does forward and backward once on this rank, on tensors of its own.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
import torch.distributed as dist

import tokenring as tr

HEADS, DIM = 8, 64


def single(length: int, causal: bool) -> Callable[[], None]:
    """The whole sequence on this process: forward and backward through the flash operator."""
    q, k, v, grad = (torch.randn(1, HEADS, length, DIM) for _ in range(4))
    flash = torch.ops.aten

    def call() -> None:
        out, lse = flash._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        flash._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, causal)

    return call


def ours(
    length: int, causal: bool, group: dist.ProcessGroup, schedule: str, backward: str, prepared: bool = False
) -> Callable[[], None]:
    """tokenring.attention, forward and backward."""
    world, rank = group.size(), group.rank()
    layout = tr.Layout.zigzag(length, world)
    rows = layout.length(rank)
    q, k, v = (torch.randn(1, rows, HEADS, DIM, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, rows, HEADS, DIM)
    mask = "causal" if causal else "full"
    options = {"layout": layout, "mask": mask, "schedule": schedule}
    if prepared:
        shape = tr.AttentionShape(1, length, length, HEADS, HEADS, DIM, dtype=torch.float32)
        options = {"plan": tr.plan(schedule, world=world, shape=shape, layout=layout, mask=mask)}
        tr.prepare(group, options["plan"])

    def call() -> None:
        out = tr.attention(q, k, v, group=group, backward_schedule=backward, **options)
        torch.autograd.grad(out, (q, k, v), grad)

    return call


def torch_ring(length: int, causal: bool, group: dist.ProcessGroup) -> Callable[[], None]:
    """torch's ring with keys and values by all-to-all, the rank's zigzag halves."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp

    cp.set_rotate_method("alltoall")
    cp._cp_options.enable_load_balance = causal
    rows = length // group.size()
    q, k, v, grad = (torch.randn(1, HEADS, rows, DIM) for _ in range(4))
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def call() -> None:
        out, lse = cp._templated_ring_attention(group, 2, forward, q, k, v, is_causal=causal)[:2]
        cp._templated_ring_attention_backward(
            group, 2, backward, grad, "grad_out", q, k, v, out, lse, causal, dropout_p=0.0
        )

    return call


def deepspeed_ulysses(length: int, causal: bool, group: dist.ProcessGroup) -> Callable[[], None]:
    """DeepSpeed's DistributedAttention over torch's SDPA; contiguous shards."""
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)

    def local(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal)
        return out.transpose(1, 2).contiguous()

    attend = DistributedAttention(local, group, scatter_idx=2, gather_idx=1)
    rows = length // group.size()
    q, k, v = (torch.randn(1, rows, HEADS, DIM, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, rows, HEADS, DIM)

    def call() -> None:
        torch.autograd.grad(attend(q, k, v, 0), (q, k, v), grad)

    return call


def picotron_ring(length: int, causal: bool, group: dist.ProcessGroup) -> Callable[[], None]:
    """picotron's ring attention; contiguous shards. Its call that waits for a GPU does nothing here."""
    import picotron.process_group_manager as manager
    from picotron.context_parallel.context_parallel import ring_attention

    if getattr(manager, "process_group_manager", None) is None:
        manager.setup_process_group_manager(1, group.size(), 1, 1)
    torch.cuda.synchronize = lambda device=None: None
    rows = length // group.size()
    q, k, v = (torch.randn(1, HEADS, rows, DIM, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, HEADS, rows, DIM)

    def call() -> None:
        torch.autograd.grad(ring_attention(q, k, v, 1 / math.sqrt(DIM), causal), (q, k, v), grad)

    return call


PEERS = {"torch ring": torch_ring, "deepspeed ulysses": deepspeed_ulysses, "picotron ring": picotron_ring}


def installed() -> dict[str, Callable[[int, bool, dist.ProcessGroup], Callable[[], None]]]:
    """The peers that can run here."""
    return {name: make for name, make in PEERS.items() if importlib.util.find_spec(name.split()[0]) is not None}

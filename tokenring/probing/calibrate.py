"""What computing costs on the ranks of a group, measured as it will be used: through `attention`, on all ranks at once.

time of a tile  =  tile_us + flops / rate          from two lengths
merging         =  bytes of a partial / rate       float32 partials of the same length
a message       =  (t(many) - t(one)) / (many - 1) sends and receives of a byte each
slowdown        =  1 - t(alone) / t(beside messages)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenring.links.costs import BACKWARD_FACTORS, FORWARD_FACTORS, ComputeRate, Costs
from tokenring.transport import Transport

if TYPE_CHECKING:
    from tokenring.topology import Topology

HEADS, HEAD_DIM = 8, 64
SMALLEST_ROWS, LARGEST_ROWS = 16, 8192
REPEATS = 3
CALLS = 4
"""A tile whose flops are timed lasts at least this many times as long as one that has next to none."""
MANY = 17
ECHOES = 15
SMALLEST_MESSAGE, LARGEST_MESSAGE = 1 << 16, 1 << 26

Agreed = Callable[[float], float]


def measure_costs(runtime: Transport, agreed: Agreed, seconds: float) -> Costs:
    """Costs of a rank, the median over ranks; collective.

    Args:
        runtime: the group's transport.
        agreed: the largest of all ranks' values; waits for all of them.
        seconds: about how long to measure.
    """
    device = runtime.device
    dtypes = (torch.float32, torch.bfloat16)
    share = seconds / (len(dtypes) + 1)
    compute = tuple(_compute_rate(runtime, agreed, dtype, share) for dtype in dtypes)
    agreed(0.0)
    merge = _gathered(runtime, _merge_gbytes_per_s(device))
    message = _gathered(runtime, _message_us(runtime, agreed))
    slowdown = _gathered(runtime, _slowdown(runtime, agreed, share))
    return Costs(compute=compute, merge_gbytes_per_s=merge, message_us=message, slowdown=slowdown)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was queued, so that a clock read afterwards counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compute_rate(runtime: Transport, agreed: Agreed, dtype: torch.dtype, share: float) -> ComputeRate:
    fixed = [agreed(x) for x in _attention_seconds(runtime.device, dtype, SMALLEST_ROWS)]
    rows, lasts = SMALLEST_ROWS, 0.0
    while rows < LARGEST_ROWS and lasts < max(share / 12, CALLS * sum(fixed)):  # a rate of calls would be none of flops
        rows *= 2
        lasts = agreed(sum(_attention_seconds(runtime.device, dtype, rows, repeats=1)))
    agreed(0.0)
    seconds = _attention_seconds(runtime.device, dtype, rows)
    flops = 2 * rows**2 * HEADS * HEAD_DIM
    forward, backward = (
        _gathered(runtime, matmuls * flops / max(whole - call, whole / 2))
        for matmuls, whole, call in zip((sum(FORWARD_FACTORS), sum(BACKWARD_FACTORS)), seconds, fixed)
    )
    many = agreed(_attention_seconds(runtime.device, dtype, SMALLEST_ROWS, documents=MANY)[0])
    tile = 1e6 * max(0.0, many - fixed[0]) / (MANY - 1)
    name = str(dtype).removeprefix("torch.")
    return ComputeRate(forward_flops=forward, backward_flops=backward, tile_us=tile, dtype=name)


def operation_us(runtime: Transport, agreed: Agreed, topology: Topology) -> float:
    """Microseconds of an operation: what a plan without work to speak of takes beyond its model, the call itself left out."""
    from tokenring.api import attention
    from tokenring.planning import plan
    from tokenring.plans.plan import Plan
    from tokenring.plans.shape import AttentionShape
    from tokenring.simulation.simulate import simulate

    def seconds(world: int, group: Transport | None) -> tuple[float, Plan]:
        length = SMALLEST_ROWS * world
        shape = AttentionShape(1, length, length, HEADS, HEADS, HEAD_DIM, dtype=torch.float32)
        tiny = plan("ring", world=world, shape=shape, layout="contiguous", mask="full")
        x = torch.randn(1, SMALLEST_ROWS, HEADS, HEAD_DIM, device=runtime.device)
        agreed(0.0)
        return agreed(_median_seconds(lambda: attention(x, x, x, group=group, plan=tiny), ECHOES)), tiny

    (alone, one), (together, ring) = seconds(1, None), seconds(runtime.world, runtime)
    beyond = together - alone - simulate(ring, topology).seconds
    return 1e6 * max(0.0, beyond) / (len(ring.operations(0)) - len(one.operations(0)))


def _attention_seconds(
    device: torch.device, dtype: torch.dtype, rows: int, documents: int = 1, repeats: int = REPEATS
) -> tuple[float, float]:
    """Median seconds of full squares of `rows` queries and keys, one for each document, forward and backward."""
    from tokenring.api import attention
    from tokenring.mask import Mask

    mask = Mask.documents([rows * k for k in range(documents + 1)], causal=False) if documents > 1 else "full"
    q, k, v, do = (torch.randn(1, rows * documents, HEADS, HEAD_DIM, device=device).to(dtype) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        out = attention(q, k, v, mask=mask)
        synchronize(device)
        middle = time.perf_counter()
        torch.autograd.grad(out, (q, k, v), do)
        synchronize(device)
        times.append((middle - start, time.perf_counter() - middle))
    kept = times[1:]  # the first call builds plans and touches memory
    return median(a for a, _ in kept), median(b for _, b in kept)


def _merge_gbytes_per_s(device: torch.device) -> float:
    """GB/s of float32 partials merged into a result."""
    from tokenring.merge import merge_

    rows = 2048
    out, part = (torch.randn(1, rows, HEADS, HEAD_DIM, device=device) for _ in range(2))
    lse, part_lse = (torch.randn(1, HEADS, rows, device=device) for _ in range(2))

    def once() -> None:
        merge_(out, lse, part, part_lse)
        synchronize(device)

    return part.numel() * part.element_size() / 1e9 / _median_seconds(once)


def _message_us(runtime: Transport, agreed: Agreed) -> float:
    """Microseconds of posting one message of a byte, sent or received, beside others."""
    if runtime.world == 1:
        return 0.0
    times = []
    for many in (1, MANY):
        messages = torch.ones(2, many, 1, dtype=torch.uint8, device=runtime.device)
        agreed(0.0)
        times.append(_median_seconds(lambda messages=messages: _around(runtime, messages), ECHOES))
    return max(0.0, times[1] - times[0]) / (MANY - 1) / 2 * 1e6


def _slowdown(runtime: Transport, agreed: Agreed, share: float) -> float:
    """Share of the compute rate that is lost while a message comes from one neighbour and one goes to the other."""
    if runtime.world == 1:
        return 0.0
    from tokenring.api import attention

    rows = SMALLEST_ROWS
    while (
        rows < LARGEST_ROWS
        and agreed(_attention_seconds(runtime.device, torch.float32, rows, repeats=1)[0]) < share / 24
    ):
        rows *= 2
    q = torch.randn(1, rows, HEADS, HEAD_DIM, device=runtime.device)

    def computes() -> None:
        attention(q, q, q, mask="full")
        synchronize(runtime.device)

    alone = agreed(_median_seconds(computes))
    size, lasts = SMALLEST_MESSAGE, 0.0
    while lasts < 2 * alone and size < LARGEST_MESSAGE:
        size *= 2
        message = torch.ones(2, 1, size, dtype=torch.uint8, device=runtime.device)
        agreed(0.0)
        lasts = agreed(_seconds(lambda message=message: _around(runtime, message)))
    beside: list[float] = []
    for _ in range(REPEATS):
        agreed(0.0)
        _around(runtime, message, lambda: beside.append(_seconds(computes)))
    together = median(beside)
    return min(1.0, max(0.0, (together - alone) / min(together, lasts)))


def _around(runtime: Transport, messages: Tensor, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Rows of messages[0] to the next rank, rows of messages[1] from the one before, `meanwhile` done beside."""
    ahead, behind = (runtime.rank + 1) % runtime.world, (runtime.rank - 1) % runtime.world
    runtime.open(0, -1, [(behind, row) for row in messages[1]])
    runtime.push(0, -1, [(ahead, row) for row in messages[0]], control=True)
    meanwhile()
    runtime.wait(0, -1)
    synchronize(runtime.device)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _median_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Of some runs after a first one, which touches memory."""
    work()
    return median(_seconds(work) for _ in range(repeats))


def _gathered(runtime: Transport, value: float) -> float:
    """The median over ranks."""
    own = torch.tensor([value], dtype=torch.float64, device=runtime.device)
    return median(float(x) for x in runtime.all_gather(own, same_shape=True, control=True))

"""Seconds of single operations on a machine: matrix products, attention, passes over memory, collectives.

matrix product   tiles / (multiprocessors) rounded up, each 2 tm tn (k + k0) FLOP, at the achieved share of the peak; never
                 faster than its operands pass through memory
collective       latency + bytes / rate of the slowest link on the way
ring             gather or scatter of S bytes over n ranks, m of them in each node: S (n - 1) / n bytes pass every link; the
                 m ranks of a node share their m ports
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from moe.planning.hardware import Hardware
from moe.planning.places import Span

TILES = ((128, 256, 1.0), (128, 128, 0.85), (64, 128, 0.6))
"""Rows and columns of an output tile, and its speed beside the first; the best for a shape is taken."""


@dataclass(frozen=True)
class Costs:
    """What operations cost on one machine."""

    hardware: Hardware

    def gemm(
        self, m: float, n: float, k: float, *, count: int = 1, precision: str = "bf16", out_bytes: float = 2
    ) -> float:
        """Seconds of `count` products (m, k) x (k, n), computed together as one grouped product."""
        hw, m = self.hardware, max(1, ceil(m))
        share = hw.gemm_bf16 if precision == "bf16" else hw.gemm_fp8
        rate = hw.peak(precision) * share / hw.multiprocessors
        seconds = min(
            ceil(count * ceil(m / rows) * ceil(n / columns) / hw.multiprocessors)
            * (2 * rows * columns * (k + hw.gemm_half_depth) / (rate * speed))
            for rows, columns, speed in TILES
        )
        in_bytes = 2 if precision == "bf16" else 1
        return max(seconds, self.memory(count * (in_bytes * (m * k + k * n) + out_bytes * m * n)))

    def linear(self, m: float, n: float, k: float, *, count: int = 1, precision: str = "bf16") -> tuple[float, float]:
        """Seconds of a linear map (m, k) -> (m, n), forward and backward; weight gradients are summed in float32.

        In FP8 the casts of inputs, weights and output gradients, also transposed, are passes over memory.
        """
        forward = self.gemm(m, n, k, count=count, precision=precision)
        backward = self.gemm(m, k, n, count=count, precision=precision)
        backward += self.gemm(n, k, m, count=count, precision=precision, out_bytes=8)
        if precision == "fp8":
            forward += self.memory(4 * count * m * k)
            backward += self.memory(4 * count * m * n)
        return forward, backward

    def attention(self, batch: float, length: float, dims: float, *, ranks: int) -> tuple[float, float]:
        """Seconds of causal attention, forward and backward.

        Args:
            batch: sequences.
            length: tokens of each.
            dims: heads x (d + d_v) on this rank.
            ranks: context parallel size; a rank computes 1 / ranks of the pairs in pieces of length / ranks.
        """
        hw = self.hardware
        flops = batch * length**2 * dims / ranks
        reached = (length / ranks) / (length / ranks + hw.attention_half_length) * hw.peak("bf16")
        return flops / (reached * hw.attention_forward), 2.5 * flops / (reached * hw.attention_backward)

    def memory(self, size: float) -> float:
        """Seconds of moving bytes through device memory."""
        return size / self.hardware.memory_rate

    def ring(self, size: float, span: Span) -> float:
        """Seconds of gathering or scattering `size` bytes, all ranks' parts together."""
        if span.size == 1 or size == 0:
            return 0.0
        hw, moved = self.hardware, size * (span.size - 1) / span.size
        if span.nodes == 1:
            return hw.inside_latency_us * 1e-6 + moved / hw.inside_rate
        return hw.between_latency_us * 1e-6 + moved / min(hw.inside_rate, span.per_node * hw.between_rate)

    def exchange(self, inside: float, between: float, *, staged: bool = False) -> float:
        """Seconds of sending bytes to ranks of one's node and of others: at once, or one after the other if `staged`."""
        hw, times = self.hardware, []
        if inside:
            times.append(hw.inside_latency_us * 1e-6 + inside / hw.inside_rate)
        if between:
            times.append(hw.between_latency_us * 1e-6 + between / hw.between_rate)
        return sum(times) if staged else max(times, default=0.0)

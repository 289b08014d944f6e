"""Which part of an expert's weights a rank of its ETP group holds: F / ETP of the inner width, wherever that width lies.

    gate_up, halves        gate 0 | gate 1 | up 0 | up 1      rank 1 of 2 holds gate 1 and up 1
    gate_up, interleaved   g u g u | g u g u                  the second half
    down, gate, up         first | second                     the second half

Files may hold the same in another order than the module: gate and up apart, a tensor for each expert, rows and columns
changed over. Written for the conversions of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, ConversionOps, Interleave, MergeModulelist, Transpose

__all__ = ["ADDED_ONCE", "HeldPart", "InnerWidth", "inner_width", "inner_width_in_file", "part_of_experts"]

ADDED_ONCE = "down_proj_bias"
"""Parts of an expert are added up; the first one has its last bias, the others keep zeros."""


@dataclass(frozen=True)
class HeldPart:
    """Which experts of a layer a module holds, and which part of each."""

    first: int
    """Number of its first expert."""
    whole: int
    """E, of the layer."""
    etp_rank: int = 0
    """Which part of each."""
    etp: int = 1
    """Into how many parts each is cut."""


@dataclass(frozen=True)
class InnerWidth:
    """Where the inner width of experts lies in a tensor.

    >>> InnerWidth(dim=-2, blocks=2).ranges(8, etp=2, etp_rank=1)
    [range(2, 4), range(6, 8)]
    """

    dim: int
    """Counted from the end: -1 or -2."""
    blocks: int = 1
    """It lies there this many times, one after the other: gates, then ups."""
    grain: int = 1
    """Neighbours that belong together: a gate and its up."""

    def ranges(self, size: int, etp: int, etp_rank: int) -> list[range]:
        """The indices of one part along `dim`, which has this size. Raises ValueError where it makes no equal parts."""
        block = size // self.blocks
        width = block // self.grain
        if width % etp:
            raise ValueError(f"experts are {width} wide, no multiple of ETP = {etp}; give a divisor")
        step = width // etp * self.grain
        starts = [i * block + etp_rank * step for i in range(self.blocks)]
        return [range(start, start + step) for start in starts]


def inner_width(module: nn.Module, name: str) -> InnerWidth:
    """Where it lies in a parameter of an experts module of transformers; `ADDED_ONCE` has none."""
    rows_first = not getattr(module, "is_transposed", False)  # (out, in), as nn.Linear has it
    dim = -1 if name.endswith("bias") or rows_first == (name == "down_proj") else -2
    if not name.startswith("gate_up"):
        return InnerWidth(dim)
    return InnerWidth(dim, blocks=2) if getattr(module, "is_concatenated", True) else InnerWidth(dim, grain=2)


def inner_width_in_file(inner: InnerWidth, operations: Sequence[ConversionOps]) -> InnerWidth:
    """Where it lies in those tensors of a file that these operations make the parameter from.

    >>> inner_width_in_file(InnerWidth(-2, blocks=2), [MergeModulelist(dim=0), Concatenate(dim=1)])
    InnerWidth(dim=-2, blocks=1, grain=1)
    """
    for op in reversed(operations):
        along = getattr(op, "dim", 0) - 3 == inner.dim  # operations count the dims of (E, rows, columns)
        match op:
            case MergeModulelist(dim=0):
                continue
            case Concatenate() if along and inner.blocks == 2:
                inner = replace(inner, blocks=1)
            case Interleave(inverse=False) if along and inner.blocks == 2:
                inner = replace(inner, blocks=1, grain=2)
            case Transpose() if {op.dim0, op.dim1} == {1, 2}:
                inner = replace(inner, dim=-3 - inner.dim)
            case _:
                names = ", ".join(type(op).__name__ for op in operations)
                raise ValueError(
                    f"experts in the files come through {names}, of which no part is known; load whole experts with "
                    "from_pretrained and spread those"
                )
    return inner


def part_of_experts(module: nn.Module, name: str, x: Tensor, etp: int, etp_rank: int) -> Tensor:
    """One part of a parameter of an experts module; a view where it lies in one piece.

    Raises:
        ValueError: experts that have no equal parts, or that cannot be cut at all.
    """
    if etp == 1:
        return x
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(
            f"{type(module).__name__} norms what an expert gives, which parts of an expert cannot; give ETP 1"
        )
    if name == ADDED_ONCE:
        return x if etp_rank == 0 else torch.zeros_like(x)
    inner = inner_width(module, name)
    pieces = [x.narrow(inner.dim, r.start, len(r)) for r in inner.ranges(x.shape[inner.dim], etp, etp_rank)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=inner.dim)

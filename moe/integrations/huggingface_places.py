"""Where transformers puts the tensors of a file among a model's experts, and how a rank reads its part of one.

    layers.0.mlp.experts.3.up_proj.weight (F, H)     -> experts.gate_up_proj (E, 2F, H) of layer 0, through Merge and Concatenate
    ETP rank 1 of 2 reads                               rows F/2 to F

Written for the conversions of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from moe.integrations.huggingface import expert_modules
from moe.integrations.huggingface_parts import ADDED_ONCE, inner_width, inner_width_in_file

__all__ = ["Place", "Places", "Slices", "cut_parameters"]


def cut_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of an experts module that hold something of every expert."""
    named = module.named_parameters(recurse=False)
    return [(name, parameter) for name, parameter in named if parameter.shape[0] == module.num_experts]


class Places:
    """By the name of a tensor in a file: which parameter of experts it goes into.

    Args:
        model: the whole model of transformers; it may be without memory.
    """

    def __init__(self, model: nn.Module) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._operations = {
            pattern: entry.operations for entry in self._converters for pattern in entry.source_patterns
        }
        self._prefix, self._known = model.base_model_prefix, model.state_dict()
        self._experts = {
            f"{at}.{name}": (module, name)
            for at, module in expert_modules(model).items()
            for name, _ in cut_parameters(module)
        }

    def of(self, name: str) -> Place | None:
        """None: it goes elsewhere."""
        target, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._known)
        if target not in self._known and name in self._known:  # so transformers does
            target, pattern = name, None
        if target not in self._experts:
            return None
        return Place(*self._experts[target], self._operations[pattern] if pattern else ())


@dataclass(frozen=True)
class Place:
    """A parameter of an experts module of the whole model, and what makes it from tensors of a file."""

    module: nn.Module
    name: str
    operations: Sequence[ConversionOps]

    @property
    def experts(self) -> int:
        """E."""
        return self.module.num_experts

    def read(self, held: Any, rows: range | None, etp: int, etp_rank: int) -> Slices | Tensor:
        """A rank's part of a tensor in a file; nothing is read yet.

        Args:
            held: the tensor, as safetensors' `get_slice` gives it.
            rows: which experts of all; None: it is of one expert.
            etp, etp_rank: into how many parts each is cut, and which of them.
        """
        size = list(held.get_shape())
        box = [slice(None) for _ in size]
        if rows is not None:
            box[0], size[0] = slice(rows.start, rows.stop), len(rows)
        if self.name == ADDED_ONCE:
            return Slices(held, [tuple(box)]) if etp_rank == 0 else torch.zeros(size)
        operations, turned = self._settled(held)
        inner, boxes = inner_width_in_file(inner_width(self.module, self.name), operations), []
        for part in inner.ranges(size[inner.dim], etp, etp_rank) if etp > 1 else [range(size[inner.dim])]:
            box[inner.dim] = slice(part.start, part.stop)
            boxes.append(tuple(box))
        return Slices(held, boxes, inner.dim, turned)

    def _settled(self, held: Any) -> tuple[list[ConversionOps], bool]:
        """Operations that will be done, and whether one of them is ours to do: changing rows and columns over.

        transformers decides that by shapes, and those of a part may mislead it.
        """
        same = list(held.get_shape()) == list(getattr(self.module, self.name).shape)
        asks = [isinstance(op, Transpose) and op.check_dims for op in self.operations]
        done = [op for op, asking in zip(self.operations, asks) if not (asking and same)]
        return done, any(asks) and not same


class Slices:
    """Slices of a tensor in a file, as one tensor; read when they are asked for, as transformers does with `[...]`."""

    def __init__(self, held: Any, boxes: Sequence[tuple[slice, ...]], dim: int = -1, turned: bool = False) -> None:
        self._held, self._boxes, self._dim, self._turned = held, boxes, dim, turned

    def __getitem__(self, everything: Any) -> Tensor:
        pieces = [self._held[box] for box in self._boxes]
        x = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=self._dim)
        return (x.transpose(-1, -2).contiguous() if self._turned else x)[everything]

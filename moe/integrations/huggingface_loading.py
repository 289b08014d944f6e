"""A mixture-of-experts model of transformers read from its directory with the experts of one rank only, and its part of each.

    file            ...experts.0.w1  ...experts.1.w1  ...experts.2.w1  ...experts.3.w1     or one tensor (E, ...) for all
    rank 1 of 2                                       read             read                or its rows 2 and 3
    ETP rank 1 of 2                                   lower half       lower half          of them

The model is built without memory, its experts modules are cut to the rank's own, and then only what they hold is read: the
others' bytes are never touched. Routers and everything else are whole. Written for transformers 5.23.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe.integrations.huggingface import expert_modules
from moe.integrations.huggingface_parts import HeldPart, part_of_experts
from moe.integrations.huggingface_places import Places, cut_parameters

__all__ = ["OwnExperts", "load_own_experts"]

ONE_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class OwnExperts:
    """Which experts of each layer a rank reads: part `part` of `parts` equal ones; and which part of each of them.

    >>> OwnExperts(1, 4).of(8)
    range(2, 4)
    """

    part: int
    parts: int
    etp_rank: int = 0
    """Which part of each."""
    etp: int = 1
    """Into how many parts each is cut."""

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part {self.part} of {self.parts} of the experts; give 0 to {self.parts - 1}")
        if not 0 <= self.etp_rank < self.etp:
            raise ValueError(f"etp_rank {self.etp_rank} of etp={self.etp}; give 0 to {self.etp - 1}")

    def of(self, experts: int) -> range:
        """Their numbers among all experts of a layer."""
        if experts % self.parts:
            raise ValueError(f"{experts} experts do not make {self.parts} equal parts; give a divisor of {experts}")
        size = experts // self.parts
        return range(self.part * size, (self.part + 1) * size)


def load_own_experts(cls: Any, path: str | Path, own: OwnExperts, *, dtype: torch.dtype) -> tuple[nn.Module, dict]:
    """A model whose experts modules hold one rank's experts; give it to `expert_parallel`, or its modules to `SpreadExperts`.

    Args:
        cls: a model class of transformers, or an Auto class.
        path: a local directory with config.json and safetensors weights.
        own: which experts, and which part of each.
        dtype: of the weights.

    Returns:
        The model on the CPU, in evaluation mode, and transformers' loading information (missing, unexpected keys).

    Raises:
        ValueError: a model without experts, experts that do not fit `own`, or no safetensors weights.
    """
    from transformers import AutoConfig, GenerationConfig

    path = Path(path)
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    whole = _without_memory(cls, config)
    cut = _cut_class(type(whole), own)
    with ExitStack() as files:
        given = dict(_tensors(path, whole, own, files))
        model, info = cut.from_pretrained(
            None, config=config, state_dict=given, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    model.__class__ = cut.__mro__[1]
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model, info


def _without_memory(cls: Any, config: Any) -> nn.Module:
    """The whole model on the meta device; of an Auto class, what it stands for."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = cls(config) if isinstance(cls, type) and issubclass(cls, nn.Module) else cls.from_config(config)
    if not expert_modules(model):
        raise ValueError(f"{type(model).__name__} holds no experts as one module; load it with from_pretrained")
    return model


def _cut_class(cls: type, own: OwnExperts) -> type:
    """The same class, whose experts modules are cut where it is built; transformers builds it on the meta device."""

    def build(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        for module in expert_modules(self).values():
            _cut(module, own)

    return type(cls.__name__, (cls,), {"__init__": build, "__module__": cls.__module__})


def _cut(module: nn.Module, own: OwnExperts) -> None:
    whole = module.num_experts
    mine = own.of(whole)
    for name, parameter in cut_parameters(module):
        kept = part_of_experts(module, name, parameter.detach()[mine.start : mine.stop], own.etp, own.etp_rank)
        setattr(module, name, nn.Parameter(kept.clone()))
    module.num_experts = len(mine)
    module._held_part = HeldPart(mine.start, whole, own.etp_rank, own.etp)


def _tensors(path: Path, model: nn.Module, own: OwnExperts, files: ExitStack) -> Iterator[tuple[str, Any]]:
    """Names and slices of what is to be read; nothing is read yet."""
    from safetensors import safe_open

    places = Places(model)
    for part_of_path in _weight_files(path):
        file = files.enter_context(safe_open(part_of_path, framework="pt"))
        for name in file.offset_keys():
            held, place = file.get_slice(name), places.of(name)
            if place is None:
                yield name, held
            elif not (one := ONE_EXPERT.search(name)):
                yield name, place.read(held, own.of(place.experts), own.etp, own.etp_rank)
            elif int(one[1]) in own.of(place.experts):
                yield name, place.read(held, None, own.etp, own.etp_rank)


def _weight_files(path: Path) -> list[Path]:
    """Those of the index, where there is one."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return [
            path / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    raise ValueError(f"{path} has neither model.safetensors nor its index; save the model again with save_pretrained")

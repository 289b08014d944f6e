"""A mixture-of-experts model of transformers read from its directory with the experts of one rank only.

    file        ...experts.0.w1  ...experts.1.w1  ...experts.2.w1  ...experts.3.w1     or one tensor (E, ...) for all
    rank 1 of 2                                   read             read                or its rows 2 and 3

The model is built without memory, its experts modules are cut to the rank's own, and then only what they hold is read: the
others' bytes are never touched. Routers and everything else are whole. Written for transformers 5.23.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.integrations.huggingface import HeldPart, expert_modules

__all__ = ["OwnExperts", "load_own_experts"]

ONE_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class OwnExperts:
    """Which experts of each layer a rank reads: part `part` of `parts` equal ones.

    >>> OwnExperts(1, 4).of(8)
    range(2, 4)
    """

    part: int
    parts: int

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.parts:
            raise ValueError(f"part {self.part} of {self.parts} of the experts; give 0 to {self.parts - 1}")

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
        own: which experts. They stay whole; ETP cuts them later.
        dtype: of the weights.

    Returns:
        The model on the CPU, in evaluation mode, and transformers' loading information (missing, unexpected keys).

    Raises:
        ValueError: a model without experts, a number of experts that does not fit `own`, or no safetensors weights.
    """
    from transformers import AutoConfig, GenerationConfig

    path = Path(path)
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    cut = _cut_class(_concrete(cls, config), own)
    with ExitStack() as files:
        given = dict(_tensors(path, own, files))
        model, info = cut.from_pretrained(
            None, config=config, state_dict=given, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    model.__class__ = cut.__mro__[1]
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model, info


def _concrete(cls: Any, config: Any) -> type:
    """The model class that an Auto class stands for."""
    if isinstance(cls, type) and issubclass(cls, nn.Module):
        return cls
    with torch.device("meta"):
        return type(cls.from_config(config))


def _cut_class(cls: type, own: OwnExperts) -> type:
    """The same class, whose experts modules are cut where it is built; transformers builds it on the meta device."""

    def build(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        modules = expert_modules(self)
        if not modules:
            raise ValueError(f"{cls.__name__} holds no experts as one module; load it with from_pretrained")
        for module in modules.values():
            _cut(module, own)

    return type(cls.__name__, (cls,), {"__init__": build, "__module__": cls.__module__})


def _cut(module: nn.Module, own: OwnExperts) -> None:
    whole = module.num_experts
    mine = own.of(whole)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.shape[0] == whole:
            setattr(module, name, nn.Parameter(parameter.detach()[mine.start : mine.stop].clone()))
    module.num_experts = len(mine)
    module._held_part = HeldPart(mine.start, whole)


class _Rows:
    """Some rows of a tensor in a file; read when they are asked for, as transformers does with `[...]`."""

    def __init__(self, whole: Any, rows: slice) -> None:
        self._whole, self._rows = whole, rows

    def __getitem__(self, everything: Any) -> Tensor:
        return self._whole[self._rows][everything]


def _tensors(path: Path, own: OwnExperts, files: ExitStack) -> Iterator[tuple[str, Any]]:
    """Names and slices of what is to be read; nothing is read yet."""
    from safetensors import safe_open

    opened = [files.enter_context(safe_open(file, framework="pt")) for file in _weight_files(path)]
    names = [(name, file) for file in opened for name in file.offset_keys()]
    experts = 1 + max((int(found[1]) for name, _ in names if (found := ONE_EXPERT.search(name))), default=-1)
    for name, file in names:
        held = file.get_slice(name)
        if found := ONE_EXPERT.search(name):
            if int(found[1]) in own.of(experts):
                yield name, held
        elif ".experts." in name:
            mine = own.of(held.get_shape()[0])
            yield name, _Rows(held, slice(mine.start, mine.stop))
        else:
            yield name, held


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

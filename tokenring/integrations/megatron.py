"""Megatron-Core's core attention, spread over its context parallel ranks; Megatron itself is not changed.

    --spec tokenring.integrations.megatron gpt_layer_local_spec                     (Megatron's training scripts)
    spec = with_tokenring(get_gpt_layer_local_spec(num_experts=8), schedule="tokenring")      (any spec of your own)
    provider.transformer_layer_spec = spec                                                    (Megatron-Bridge)

`TokenRingAttention` takes the place of DotProductAttention or TEDotProductAttention. It reads what they read: Megatron's
zigzag cut, packed documents, `pg_collection.cp`, a group for one micro-batch (dynamic context parallelism), sliding windows,
sinks, and calls made again under recomputation. Heads are those of the tensor parallel rank. `cp_comm_type` names the
schedule, and `schedule=` in the spec wins:

    unset           auto               a2a        ulysses
    p2p             ring               a2a+p2p    usp:UxR, the sizes of the hierarchical groups
    all_gather      gather             a schedule's own name (auto, tokenring, mesh:2x4, ...): that

The training scripts set p2p where nobody says; `--cp-comm-type auto` lets tokenring choose. A ready spec holds for configs
that set what its name says (qk_layernorm, multi_latent_attention) and nothing else of the kind, and refuses others: MoE and
further variants go through `with_tokenring`. What cannot be honoured raises ValueError, when the layer is built where that
can be known: dropout of attention, 8-bit attention, biases, arbitrary masks.

Written for megatron-core 0.16.1 to 0.19.2. (0.16.1 itself reads a *list* of cp_comm_type off by one, and fails at the last layer.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from tokenring.integrations.megatron_attention import TokenRingAttention
from tokenring.topology import Topology

__all__ = [
    "TokenRingAttention",
    "core_attention",
    "gpt_layer_local_mla_spec",
    "gpt_layer_local_qk_layernorm_spec",
    "gpt_layer_local_spec",
    "gpt_layer_te_mla_spec",
    "gpt_layer_te_qk_layernorm_spec",
    "gpt_layer_te_spec",
    "hybrid_stack_spec",
    "with_tokenring",
]

_REPLACED = ("DotProductAttention", "TEDotProductAttention", "TokenRingAttention")


def core_attention(
    *,
    schedule: str | None = None,
    backward_schedule: str | None = None,
    kernel: str = "auto",
    partial_dtype: str | torch.dtype = "input",
    topology: Topology | None = None,
    packed_layout: str = "documents",
    layer_has: Sequence[str] | None = None,
    prepare: bool = False,
) -> ModuleSpec:
    """A spec of `TokenRingAttention` with its own options, for `submodules.core_attention`.

    >>> core_attention(schedule="tokenring").params["schedule"]
    'tokenring'
    """
    how = {"schedule": schedule, "backward_schedule": backward_schedule, "topology": topology, "prepare": prepare}
    what = {"kernel": kernel, "partial_dtype": partial_dtype, "packed_layout": packed_layout, "layer_has": layer_has}
    return ModuleSpec(TokenRingAttention, params=how | what)


def with_tokenring(spec: Any, **options: Any) -> Any:
    """A copy of a spec in which every dot-product core attention is `TokenRingAttention`; the given one stays as it is.

    Args:
        spec: of a layer, a block, a multi-token prediction block or a hybrid stack. Other kinds of attention in it (DSA,
            linear attention) are left alone.
        options: those of `core_attention`.

    >>> spec = with_tokenring(gpt_layer_specs.get_gpt_layer_local_spec(qk_layernorm=True), schedule="tokenring")
    >>> spec.submodules.self_attention.submodules.core_attention.module.__name__
    'TokenRingAttention'
    """
    attention = core_attention(**options)
    done: list[str] = []
    copy = _swap(spec, attention, done)
    if not done:
        raise ValueError(
            f"{type(spec).__name__} holds no DotProductAttention or TEDotProductAttention to replace; give a ModuleSpec or "
            "block spec of Megatron's GPT or hybrid models"
        )
    return copy


def _swap(part: Any, attention: ModuleSpec, done: list[str]) -> Any:
    """Parts in which nothing is replaced are the given ones, not copies."""
    if isinstance(part, functools.partial):
        keywords = {name: _swap(value, attention, done) for name, value in part.keywords.items()}
        changed = any(value is not part.keywords[name] for name, value in keywords.items())
        return functools.partial(part.func, *part.args, **keywords) if changed else part
    if isinstance(part, (list, tuple)):
        items = [_swap(x, attention, done) for x in part]
        return type(part)(items) if any(a is not b for a, b in zip(items, part)) else part
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return part
    fields = {}
    for name in (f.name for f in dataclasses.fields(part) if f.init):
        value = getattr(part, name)
        if name == "core_attention" and _class_name(value) in _REPLACED:
            done.append(name)
            fields[name] = attention
        elif (swapped := _swap(value, attention, done)) is not value:
            fields[name] = swapped
    return dataclasses.replace(part, **fields) if fields else part


def _class_name(part: Any) -> str:
    return getattr(getattr(part, "module", part), "__name__", "")


class Unavailable(TransformerLayer):
    """Stands for a spec whose parts cannot be imported here: building it says what is missing."""

    def __init__(self, *args: Any, missing: str, **kwargs: Any) -> None:
        raise ValueError(f"this spec needs {missing}, which cannot be imported here; install it, or use a local spec")


def _ready(backend: str, **flags: bool) -> ModuleSpec:
    if backend == "transformer_engine" and not HAVE_TE:
        return ModuleSpec(Unavailable, params={"missing": "transformer_engine"})
    name = "get_gpt_layer_local_spec" if backend == "local" else "get_gpt_layer_with_transformer_engine_spec"
    return with_tokenring(getattr(gpt_layer_specs, name)(**flags), layer_has=tuple(flags))


def _hybrid() -> ModuleSpec:
    if not HAVE_TE:
        return ModuleSpec(Unavailable, params={"missing": "transformer_engine"})
    try:
        from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
    except ImportError as error:
        return ModuleSpec(Unavailable, params={"missing": error.name or str(error)})
    return with_tokenring(mamba_stack_spec)


gpt_layer_local_spec = _ready("local")
gpt_layer_local_qk_layernorm_spec = _ready("local", qk_layernorm=True)
gpt_layer_local_mla_spec = _ready("local", multi_latent_attention=True)
gpt_layer_te_spec = _ready("transformer_engine")
gpt_layer_te_qk_layernorm_spec = _ready("transformer_engine", qk_layernorm=True)
gpt_layer_te_mla_spec = _ready("transformer_engine", multi_latent_attention=True)
hybrid_stack_spec = _hybrid()

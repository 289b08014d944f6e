"""transformers models over several ranks, through transformers' own public interfaces and nothing else.

    with sequence_parallel(model, group, layout):
        cache = SpreadCache(layout, group)
        hidden = model(input_ids=layout.shard(ids, rank), position_ids=layout.shard(positions, rank), past_key_values=cache)
        ...                                                     # then one token at a time, the same on every rank

Inside the block attention is `tokenring.attention` (prompt) and `tokenring.decode_attention` (later tokens), chosen through
`AttentionInterface.register` and `AttentionMaskInterface.register`. One context object on each of the model's own attention
modules says which group and layout; it and the two forward pre-hooks are gone when the block ends. What cannot be honoured
(padding, sliding windows, packed documents, dropout, attention maps) raises ValueError; nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

import tokenring as tr
from tokenring.integrations.hf_cache import SpreadCache
from tokenring.integrations.hf_checks import (
    check_call,
    check_layout,
    check_padding,
    check_positions,
    check_rows,
    named,
    spread_cache,
)
from tokenring.layout import Layout
from tokenring.transport import connect

NAME = "tokenring"
_ATTRIBUTE = "tokenring_context"
# What model code hands down to attention that says nothing about which keys are attended to, or how.
_HARMLESS = frozenset(
    {
        "position_ids",
        "use_cache",
        "cache_position",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
        "num_items_in_batch",
    }
)

__all__ = ["NAME", "SpreadCache", "register", "sequence_parallel"]


@dataclass
class _Context:
    group: Any
    rank: int
    layout: Layout
    schedule: str
    cache: SpreadCache | None = None
    decoding: bool = False


def register() -> None:
    """Make the attention name "tokenring" known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def sequence_parallel(model: nn.Module, group: Any, layout: Layout, schedule: str = "auto") -> Iterator[nn.Module]:
    """Run a decoder model of transformers with its rows cut over the ranks of `group`.

    Inside the block every rank calls the model with its own rows: `input_ids` or `inputs_embeds` (B, layout.length(rank)),
    `position_ids` (B, rows), or (3, B, rows) for M-RoPE, and `past_key_values` a `SpreadCache` of the same layout and group,
    or nothing. The hidden states and logits are those of the same rows on one rank. With a cache that holds the prompt, a
    call brings new tokens instead, the same on every rank, and gives the same result on every rank.

    Args:
        model: a model whose causal attention goes through transformers' AttentionInterface (Llama, Qwen2, Qwen3, SmolLM,
            and the text models of Qwen2.5-VL, Qwen3-VL, LLaVA-OneVision); text models inside larger ones are found.
        group: ProcessGroup, 1-D DeviceMesh, LocalGroup or None.
        layout: which row of the prompt each rank holds; every rank at least one.
        schedule: as in `tokenring.attention`.

    Raises:
        ValueError: for a model, layout or call that cannot be honoured, with the reason.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                                      num_attention_heads=2, num_key_value_heads=1)).eval()
    >>> ids, positions = torch.tensor([[1, 5, 2]]), torch.arange(3)[None]
    >>> with torch.no_grad(), sequence_parallel(model, None, Layout.contiguous(3, 1)):
    ...     model(input_ids=ids, position_ids=positions).logits.shape
    torch.Size([1, 3, 8])
    """
    runtime = connect(group)
    check_layout(layout, runtime.world)
    text_model, modules = _find(model)
    former = text_model.config._attn_implementation
    context = _Context(group, runtime.rank, layout, schedule)
    register()
    with ExitStack() as undo:
        undo.callback(text_model.set_attn_implementation, former)
        text_model.set_attn_implementation(NAME)
        if text_model.config._attn_implementation != NAME:
            raise ValueError(
                f"{type(text_model).__name__} does not take its attention from transformers' AttentionInterface; use a "
                "model that does (Llama, Qwen2, Qwen3, SmolLM and others)"
            )
        for module in modules:
            undo.callback(delattr, module, _ATTRIBUTE)
            setattr(module, _ATTRIBUTE, context)
        undo.callback(model.register_forward_pre_hook(check_call, with_kwargs=True).remove)
        hook = text_model.register_forward_pre_hook(_Enter(context), with_kwargs=True)
        undo.callback(hook.remove)
        yield model


def _find(model: nn.Module) -> tuple[PreTrainedModel, list[nn.Module]]:
    """The innermost transformers model that owns the causal attention modules, and those modules."""
    modules = [m for m in model.modules() if _is_decoder_attention(m)]
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no causal attention module of transformers; give a decoder model such as Llama"
        )
    if any(hasattr(m, _ATTRIBUTE) for m in modules):
        raise ValueError(f"{type(model).__name__} is already inside sequence_parallel; leave that block first")
    config = modules[0].config
    owners = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is config]
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if kinds:
        raise ValueError(f"{type(model).__name__} has {kinds[0]} layers; only full causal attention can be spread")
    if not owners or len(modules) != config.num_hidden_layers or any(m.config is not config for m in modules):
        raise ValueError(
            f"{type(model).__name__} has {len(modules)} causal attention modules for {config.num_hidden_layers} layers; "
            "every layer must mix rows by causal attention only"
        )
    return owners[-1], modules


def _is_decoder_attention(module: nn.Module) -> bool:
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", None) is True
        and hasattr(module, "config")
    )


class _Enter:
    """Pre-hook of the text model: check what it was handed, and tell the attention modules prompt from later tokens."""

    def __init__(self, context: _Context) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict]:
        context, call = self.context, named(module, args, kwargs)
        rows = call["inputs_embeds"] if call.get("inputs_embeds") is not None else call["input_ids"]
        cache = spread_cache(call.get("past_key_values"), context)
        context.cache, context.decoding = cache, cache is not None and cache.prefilled
        if call.get("output_attentions") or getattr(module.config, "output_attentions", False):
            raise ValueError("output_attentions cannot be honoured: tokenring never holds an attention map")
        check_padding(call.get("attention_mask"))
        if call.get("position_ids") is None:
            raise ValueError("position_ids is missing; give this rank's own, layout.shard(position_ids, rank)")
        if not context.decoding:
            check_rows(rows.shape[1], context)
            check_positions(call["position_ids"], context)
        # transformers looks for packed documents in position_ids only where no mask and no cache is given, and would
        # take a zigzag shard, whose positions jump, for two documents.
        call["attention_mask"] = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        call["use_cache"] = cache is not None
        return (), call


def _mask(*, mask_function: Any = causal_mask_function, **kwargs: Any) -> None:
    """The mask function: plain causal needs no tensor, everything else is refused."""
    if mask_function is not causal_mask_function or not kwargs.get("allow_is_causal_skip", True):
        raise ValueError(
            "the model asks for a mask other than plain causal (sliding window, chunks, packed documents or an overlay), "
            'which attention "tokenring" cannot honour'
        )
    check_padding(kwargs.get("attention_mask"))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: q (B, Hq, S, D), k and v (B, Hkv, S, D) in, (B, S, Hq, D) out."""
    context = getattr(module, _ATTRIBUTE, None)
    if context is None:
        raise ValueError(
            'attention "tokenring" was called outside tokenring.integrations.huggingface.sequence_parallel(model, group, '
            "layout); wrap the call in it"
        )
    options = _options(module, attention_mask, dropout, kwargs)
    options |= {"group": context.group, "scale": scaling, "mask": "causal"}
    if context.decoding:
        keys, values, lengths, positions = context.cache.local(module.layer_idx)
        out = tr.decode_attention(query.transpose(1, 2), keys, values, lengths=lengths, positions=positions, **options)
        return out, None
    rows = (x.transpose(1, 2) for x in (query, key, value))
    return tr.attention(*rows, layout=context.layout, schedule=context.schedule, **options), None


def _options(module: nn.Module, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> dict[str, Any]:
    if mask is not None:
        raise ValueError(f"attention got a mask tensor {tuple(mask.shape)}; only plain causal can be honoured")
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} cannot be honoured; call model.eval() or set attention_dropout=0"
        )
    given = {name: value for name, value in kwargs.items() if value is not None and name not in _HARMLESS}
    options = {"softcap": given.pop("softcap", None), "sinks": given.pop("s_aux", given.pop("sinks", None))}
    if not given.pop("is_causal", module.is_causal):
        raise ValueError("is_causal=False cannot be honoured; the layers of this model run causally")
    if given.pop("output_attentions", False):
        raise ValueError("output_attentions cannot be honoured: tokenring never holds an attention map")
    if given:
        name, value = min(given.items(), key=lambda item: item[0])
        shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f'attention "tokenring" does not know {name}={shown} and will not ignore it')
    return options

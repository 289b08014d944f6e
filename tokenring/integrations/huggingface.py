"""transformers models over several ranks, through transformers' own public interfaces and nothing else.

    with sequence_parallel(model, group):
        text = model.generate(ids, past_key_values=SpreadCache(None, group), max_new_tokens=20)

or with every step in your own hands:

    with sequence_parallel(model, group, layout):
        cache = SpreadCache(layout, group)
        hidden = model(input_ids=layout.shard(ids, rank), position_ids=layout.shard(positions, rank), past_key_values=cache)
        ...                                                     # then one token at a time, the same on every rank
    with sequence_parallel(model, group, cache.deal(rows)):     # a further prompt on top of what the cache holds
        ...

Inside the block attention is `tokenring.attention` (prompts) and `tokenring.decode_attention` (a few tokens), chosen through
`AttentionInterface.register` and `AttentionMaskInterface.register`. One context object on each of the model's own attention
modules says which group and layout; it and the hooks are gone when the block ends. What cannot be honoured (padding, packed
documents, dropout, attention maps, masks that are neither causal nor a sliding window) raises ValueError; nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

import tokenring as tr
from tokenring.integrations.hf_cache import SpreadCache
from tokenring.integrations.hf_checks import check_call, check_layout, check_padding, mask_of, windows_of
from tokenring.integrations.hf_rows import Context, Enter, Leave
from tokenring.layout import Layout
from tokenring.mask import Mask
from tokenring.transport import connect

if TYPE_CHECKING:
    from tokenring.topology import Topology

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
        "sliding_window",  # `_checked_mask` reads it
    }
)

Prefill = Callable[..., Tensor]
"""attend(layer, q, k, v, *, group, layout, kv_layout, mask, scale, softcap, sinks) -> out, see `prefill_with`."""

__all__ = ["NAME", "Prefill", "SpreadCache", "find_decoder", "prefill_with", "register", "sequence_parallel"]


def register() -> None:
    """Make the attention name "tokenring" known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def sequence_parallel(
    model: nn.Module,
    group: Any,
    layout: Layout | None = None,
    schedule: str = "auto",
    *,
    topology: Topology | None = None,
    cut_from: int = 128,
) -> Iterator[nn.Module]:
    """Run a decoder model of transformers with its rows cut over the ranks of `group`.

    Inside the block every rank calls the model with its own rows: `input_ids` or `inputs_embeds` (B, layout.length(rank)),
    `position_ids` (B, rows), or (3, B, rows) for M-RoPE, and `past_key_values` a `SpreadCache` of the same layout and group,
    or nothing. The hidden states and logits are those of the same rows on one rank. Or every rank gives all rows, as
    `model.generate` does: they are cut here, and the result has all rows, on every rank.

    Once the layout's rows are in the cache, a call brings new rows, the same on every rank, with the same result on every
    rank. For a further prompt cut by the caller, enter a new block with `cache.deal(rows)`. Ranks that draw tokens at random
    must be seeded alike.

    Args:
        model: a model whose causal attention goes through transformers' AttentionInterface (Llama, Mistral, Qwen2, Qwen3,
            SmolLM, and the text models of Qwen2.5-VL, Qwen3-VL, LLaVA-OneVision); text models inside larger ones are found.
        group: ProcessGroup, 1-D DeviceMesh, LocalGroup or None.
        layout: which row of the prompt each rank holds; every rank at least one. None: rows come whole, and are dealt.
        schedule: as in `tokenring.attention`.
        topology: as in `tokenring.attention` and `tokenring.decode_attention`.
        cut_from: so many new rows, given whole on top of a cache, are cut over the ranks; fewer are computed whole on each.

    Raises:
        ValueError: for a model, layout or call that cannot be honoured, with the reason.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                                      num_attention_heads=2, num_key_value_heads=1)).eval()
    >>> import torch
    >>> ids, positions = torch.tensor([[1, 5, 2]]), torch.arange(3)[None]
    >>> with torch.no_grad(), sequence_parallel(model, None, Layout.contiguous(3, 1)):
    ...     model(input_ids=ids, position_ids=positions).logits.shape
    torch.Size([1, 3, 8])
    """
    runtime = connect(group)
    check_layout(layout, runtime.world)
    if cut_from < 1:
        raise ValueError(f"cut_from is {cut_from}; give 1 or more rows")
    text_model, modules = find_decoder(model)
    if any(hasattr(m, _ATTRIBUTE) for m in modules):
        raise ValueError(f"{type(model).__name__} is already inside sequence_parallel; leave that block first")
    former = text_model.config._attn_implementation
    options = {"schedule": schedule, "topology": topology}
    windows = windows_of(text_model.config)
    context = Context(group, runtime.rank, runtime.world, layout, cut_from, options, windows)
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
        undo.callback(text_model.register_forward_pre_hook(Enter(context), with_kwargs=True).remove)
        undo.callback(text_model.register_forward_hook(Leave(context)).remove)
        yield model


@contextmanager
def prefill_with(model: nn.Module, attend: Prefill) -> Iterator[bool]:
    """Inside `sequence_parallel`: prompts are attended to by `attend`; new tokens stay with `tokenring.decode_attention`.

    Yields False, and changes nothing, where the model is not inside `sequence_parallel`.

    Args:
        attend: called by every layer with its number, q (B, rows, Hq, D), k and v (B, rows, Hkv, D) of this rank, and by name
            group, layout, mask, scale, softcap, sinks; `kv_layout`: which positions each rank's keys hold where the cache held
            earlier rows (k and v are then all rows of this rank), else None. Returns out (B, rows, Hq, Dv).
    """
    contexts = {id(c): c for m in find_decoder(model)[1] if (c := getattr(m, _ATTRIBUTE, None)) is not None}
    if any(context.prefill is not None for context in contexts.values()):
        raise ValueError(f"{type(model).__name__} already prefills with another attention; leave that block first")
    try:
        for context in contexts.values():
            context.prefill = attend
        yield bool(contexts)
    finally:
        for context in contexts.values():
            context.prefill = None


def find_decoder(model: nn.Module) -> tuple[PreTrainedModel, list[nn.Module]]:
    """The innermost transformers model that owns the causal attention modules, and those modules, a layer each.

    Raises:
        ValueError: there is none, or not every layer mixes rows by full or sliding causal attention.
    """
    modules = [m for m in model.modules() if _is_decoder_attention(m)]
    if not modules:
        raise ValueError(
            f"{type(model).__name__} has no causal attention module of transformers; give a decoder model such as Llama"
        )
    config = modules[0].config
    owners = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is config]
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if kinds:
        raise ValueError(
            f"{type(model).__name__} has {kinds[0]} layers; only full and sliding causal attention can be spread"
        )
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


def _mask(*, mask_function: Any = causal_mask_function, **kwargs: Any) -> Mask | None:
    """The mask function: no tensor, but the mask as a value, which the layers hand down to `_attention`."""
    check_padding(kwargs.get("attention_mask"))
    return mask_of(mask_function, kwargs.get("local_size"), kwargs.get("allow_is_causal_skip", True))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | None,
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
    options |= {"scale": scaling, "mask": _checked_mask(module, attention_mask, kwargs.get("sliding_window"), context)}
    q, layer = query.transpose(1, 2), None if context.cache is None else context.cache.layers[module.layer_idx]
    if context.chunk is None:
        return layer.store.decode(q, topology=context.options["topology"], **options), None
    rows = (q, key.transpose(1, 2), value.transpose(1, 2))
    if context.prefill is not None:
        held = layer.store.layout if context.continued else None
        where = {"group": context.group, "layout": context.chunk, "kv_layout": held}
        out = context.prefill(module.layer_idx, *rows, **where, **options)
    elif context.continued:
        out = layer.store.attention(q, context.chunk, **options, **context.options)
    else:
        out = tr.attention(*rows, group=context.group, layout=context.chunk, **options, **context.options)
    if layer is not None:
        layer.trim()
    return out, None


def _checked_mask(module: nn.Module, mask: Mask | None, window: int | None, context: Context) -> Mask:
    """The mask of a layer, if all that speak of a window say the same."""
    asked = Mask.causal() if mask is None else mask
    kept = context.windows.get(module.layer_idx) if context.cache is not None else None
    for said, who in ((window, "attention is called"), (kept, "the cache keeps rows")):
        if said is not None and asked != Mask.window(said - 1):
            raise ValueError(
                f"layer {module.layer_idx}: {who} with a sliding window of {said} and the model's mask is another; such a model "
                'cannot be honoured by attention "tokenring"'
            )
    return asked


def _options(module: nn.Module, mask: Any, dropout: float, kwargs: dict[str, Any]) -> dict[str, Any]:
    if mask is not None and not isinstance(mask, Mask):
        shown = f"a mask tensor {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__} as mask"
        raise ValueError(f"attention got {shown}; only plain causal and sliding windows can be honoured")
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

"""What `sequence_parallel` refuses: one function for each thing a caller can get wrong, each with its one-line reason."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from tokenring.integrations.hf_cache import SpreadCache
from tokenring.layout import Layout
from tokenring.mask import Mask
from tokenring.transport import connect


def check_layout(layout: Layout | None, world: int) -> None:
    if layout is None:
        return
    if not isinstance(layout, Layout):
        raise ValueError(
            f"layout is {layout!r}; give a tokenring.Layout, for instance Layout.zigzag(length, {world}), or None"
        )
    if layout.world != world:
        raise ValueError(f"layout is for {layout.world} ranks and the group has {world}")
    empty = [r for r in range(world) if layout.length(r) == 0]
    if empty:
        raise ValueError(
            f"layout {layout.name} of {layout.total} rows gives none to rank {empty[0]}; transformers models need at "
            "least one row on every rank: use fewer ranks or another layout"
        )


def named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args)), **kwargs}


def check_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what only the outermost call shows: the model fills these in on the way down."""
    given = {name: value for name, value in named(module, args, kwargs).items() if value is not None}
    if "position_ids" not in given:
        raise ValueError("position_ids is missing; give this rank's own, layout.shard(position_ids, rank)")
    if given.get("use_cache") and "past_key_values" not in given:
        raise ValueError("use_cache=True needs past_key_values=SpreadCache(layout, group) inside sequence_parallel")
    if "labels" in given:
        raise ValueError(
            "labels are shifted inside the model, which is wrong at the edges of shards; leave them out and compare the "
            "logits with layout.shard_labels(labels, rank)"
        )
    pixels = sorted(name for name in given if name.startswith("pixel_values"))
    if pixels:
        raise ValueError(f"{pixels[0]} cannot be given inside sequence_parallel; embed first and give inputs_embeds")


def spread_cache(cache: Any, context: Any) -> SpreadCache | None:
    if cache is None:
        return None
    if not isinstance(cache, SpreadCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; inside sequence_parallel give a SpreadCache(layout, group)"
        )
    layout = context.layout
    same_group = cache.group is context.group or connect(cache.group) is connect(context.group)
    if cache.prefilled:
        taken = cache.cuts.get(layout.offset) if layout is not None else None
        fits = layout is None or layout == taken or layout.offset == cache.ledger.stop
    else:
        fits = layout is None or cache.layout in (None, layout)
    if not same_group or not fits:
        raise ValueError(
            "past_key_values was made for another layout or group than sequence_parallel: give the cache's own layout, or for a "
            f"further prompt cache.deal(rows), which starts at {cache.ledger.stop}"
        )
    if cache.prefilled and dict(cache.windows) != context.windows:
        raise ValueError(
            "past_key_values was filled by a model with other sliding windows; use one cache for each model"
        )
    return cache


def check_padding(mask: Any) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask is {shape}; give none, or a 2-D one of ones (causal is what is computed)")
    if not bool(mask.bool().all()):
        raise ValueError(
            "attention_mask has zeros (padding), which cannot be honoured; run rows of one length, unpadded"
        )


def check_positions(position_ids: Tensor, chunk: Layout, rank: int, start: int) -> None:
    """Packed documents start again at 0, so a row's position falls below its place in the sequence. Gaps are legal."""
    if position_ids.ndim == 3 and position_ids.shape[0] != 4:
        return  # M-RoPE without text positions: its axes say nothing about documents
    text = position_ids[0] if position_ids.ndim == 3 else position_ids
    places = (chunk.positions(rank) - start).to(text.device)
    order = places.argsort()
    if text.shape[-1] != places.numel():
        raise ValueError(f"position_ids has {text.shape[-1]} entries for {places.numel()} rows on rank {rank}")
    text = text[:, order]
    if bool((text < places[order]).any()) or bool((text.diff(dim=-1) <= 0).any()):
        raise ValueError(
            "position_ids start again or fall behind the rows' places in the sequence: packed documents cannot be "
            "honoured yet, and positions must be global, not counted from 0 on each rank or in each prompt"
        )


def windows_of(config: Any) -> dict[int, int]:
    """Of each layer with a sliding window, how many positions it spans, as far as the model's configuration says."""
    window = getattr(config, "sliding_window", None)
    if window is None:
        return {}
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return {layer: window for layer, kind in enumerate(kinds) if kind == "sliding_attention"}


def mask_of(mask_function: Any, window: int | None, plain: bool) -> Mask | None:
    """What a model asks for, as a mask; None for plain causal.

    Args:
        mask_function: of transformers, true where a query index may attend to a key index.
        window: how many positions a sliding window spans, if there is one.
        plain: whether nothing was laid over it.
    """
    if plain and mask_function is causal_mask_function:
        return None
    if plain and window is not None and _is_window(mask_function, window):
        return Mask.window(window - 1)
    raise ValueError(
        "the model asks for a mask other than plain causal or a sliding window (chunks, packed documents or an overlay), "
        'which attention "tokenring" cannot honour'
    )


def _is_window(mask_function: Any, window: int) -> bool:
    """Whether it is causal and slides: probed at the queries where a window of this span shows its edges."""
    keys = torch.arange(2 * window + 2)[None]
    queries = torch.tensor([0, window - 1, window, 2 * window])[:, None]
    zero = torch.zeros((), dtype=torch.int64)
    allowed = mask_function(zero, zero, queries, keys)
    return bool(torch.equal(allowed, Mask.window(window - 1).dense(queries[:, 0], keys[0])))

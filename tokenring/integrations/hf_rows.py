"""Which rows of the sequence a model call brings, and how they are cut over the ranks.

    the block's layout is not in the cache     this rank's rows of it, or all of them, the same on every rank
    later                                      new rows, the same on every rank: `cut_from` or more are cut over the ranks,
                                               fewer are computed whole on each

Rows that come whole and are cut here leave the model whole again, so `model.generate` works as on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokenring.caching.dealing import deal
from tokenring.integrations.hf_cache import SpreadCache
from tokenring.integrations.hf_checks import check_padding, check_positions, named, spread_cache
from tokenring.layout import Layout

_ROWS = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "cache_position": 0}
"""What has an entry for each row, and in which dim."""


@dataclass
class Context:
    """What the attention modules of a model need to know: fixed for a block, save for the call under way."""

    group: Any
    rank: int
    world: int
    layout: Layout | None
    cut_from: int
    options: dict[str, Any]
    """schedule and topology of `tokenring.attention`."""
    windows: dict[int, int] = field(default_factory=dict)
    cache: SpreadCache | None = None
    chunk: Layout | None = None
    """The cut of the rows of this call; None: new tokens, computed whole on every rank."""
    continued: bool = False
    """Whether the cache holds rows before those of this call."""
    gather: bool = False
    """Whether the rows came whole."""
    prefill: Callable[..., Tensor] | None = None
    """What attends to prompts instead of `tokenring.attention`; see `huggingface.prefill_with`."""


class Enter:
    """Pre-hook of the text model: check what it was handed, cut what came whole."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict]:
        context, call = self.context, named(module, args, kwargs)
        rows = call["inputs_embeds"] if call.get("inputs_embeds") is not None else call["input_ids"]
        cache = spread_cache(call.get("past_key_values"), context)
        if call.get("output_attentions") or getattr(module.config, "output_attentions", False):
            raise ValueError("output_attentions cannot be honoured: tokenring never holds an attention map")
        check_padding(call.get("attention_mask"))
        if call.get("position_ids") is None:
            raise ValueError("position_ids is missing; give this rank's own, layout.shard(position_ids, rank)")
        context.cache, context.continued = cache, cache is not None and cache.prefilled
        context.chunk = _chunk(rows.shape[1], context)
        context.gather = context.chunk is not None and rows.shape[1] != context.chunk.length(context.rank)
        if context.gather:
            call = _cut(call, context.chunk, context.rank)
            rows = call["inputs_embeds"] if call.get("inputs_embeds") is not None else call["input_ids"]
        if context.chunk is not None:
            start = cache.ledger.whole.offset if context.continued else context.chunk.offset
            check_positions(call["position_ids"], context.chunk, context.rank, start)
        if cache is not None:
            cache.ledger.expect(context.chunk)
            if not context.continued:
                cache.windows = dict(context.windows)
        # transformers looks for packed documents in position_ids only where no mask and no cache is given, and would
        # take a zigzag shard, whose positions jump, for two documents.
        call["attention_mask"] = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        call["use_cache"] = cache is not None
        return (), call


class Leave:
    """Hook of the text model: put together what came whole, note what the cache holds now."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        context = self.context
        if context.cache is not None and context.chunk is not None:
            context.cache.cuts[context.chunk.offset] = context.chunk
        if not context.gather:
            return output
        if isinstance(output, Mapping):
            for name, value in list(output.items()):
                output[name] = _whole(value, context)
            return output
        return _whole(output, context)


def _chunk(count: int, context: Context) -> Layout | None:
    """The cut of `count` rows that a call brings; None where all are computed on every rank."""
    cache, rank, world = context.cache, context.rank, context.world
    layout = context.layout if context.layout is not None or cache is None else cache.layout
    if layout is not None and (not context.continued or layout.offset == cache.ledger.stop):
        if count not in (layout.length(rank), layout.total):
            raise ValueError(
                f"rank {rank} got {count} rows; the layout gives it {layout.length(rank)}: cut the whole with layout.shard, or "
                f"give all {layout.total} on every rank"
            )
        return layout
    if count >= max(world, context.cut_from if cache is not None else 1):
        return deal([0] * world, count, at_least=1) if cache is None else cache.deal(count)
    if cache is None:
        raise ValueError(f"got {count} rows for {world} ranks; give at least one for each rank, or fewer ranks")
    return None


def _cut(call: dict[str, Any], chunk: Layout, rank: int) -> dict[str, Any]:
    """This rank's rows of everything that has one entry for each row."""
    mine = dict(call)
    for name, value in call.items():
        if not isinstance(value, Tensor) or name == "attention_mask":
            continue
        if name in _ROWS:
            mine[name] = chunk.shard(value, rank, dim=_ROWS[name] % value.ndim)
        elif chunk.total in value.shape:
            raise ValueError(
                f"{name} {tuple(value.shape)} seems to have an entry for each of the {chunk.total} rows, and rows that come whole "
                "cannot be cut with it; give this rank's own rows of everything"
            )
    if call.get("output_router_logits"):
        raise ValueError(
            "output_router_logits cannot be put together from rows that come whole; give this rank's own rows"
        )
    return mine


def _whole(value: Any, context: Context) -> Any:
    """Hidden states (B, rows, H), or a tuple of them, with the rows of every rank."""
    if isinstance(value, tuple):
        return tuple(_whole(one, context) for one in value)
    if isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == context.chunk.length(context.rank):
        return context.chunk.gather(value, context.group)
    return value

"""transformers models that prefill sparsely and decode exactly, through transformers' own public interfaces.

    with sparse_prefill(model, AnchorConfig()) as calls:                                        # one device
        model.generate(ids, max_new_tokens=20)

    with sequence_parallel(model, group), sparse_prefill(model, AnchorConfig()) as calls:       # over ranks
        model.generate(ids, past_key_values=SpreadCache(None, group), max_new_tokens=20)

    calls[3].density        # of layer 3's last prefill

Calls with few new rows (decoding) are dense attention. Padding, sliding windows, soft-capping, sinks and dropout are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from sparse_attn.api import Numbers, anchor_attention
from sparse_attn.config import AnchorConfig
from sparse_attn.density import theta_for_density
from sparse_attn.stats import Stats
from sparse_attn.stripes import StripePlan
from sparse_attn.tune import TunedConfig
from tokenring import Layout, Mask
from tokenring.integrations.huggingface import find_decoder, prefill_with

NAME = "sparse_attn"
_ATTRIBUTE = "sparse_attn_prefill"


@dataclass
class _Prefill:
    """How every layer of a model prefills, and what became of it."""

    config: AnchorConfig | TunedConfig
    exact_below: int
    keep: Numbers | None
    plans: Mapping[int, StripePlan] | None
    keep_plans: bool
    density: float | None
    watch: Callable[[int, Tensor, Tensor, float | None], None] | None
    calls: dict[int, Stats] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, **where: Any) -> Tensor:
        """One prefill of one layer; rows (B, S, H, D)."""
        if self.watch is not None:
            self.watch(layer, q, k, scale)
        config = self._of(layer)
        if self.density is not None:
            config = replace(config, theta=theta_for_density(q, k, self.density, config=config, scale=scale, **where))
        told: dict[str, Any] = {"config": config, "keep": self.keep}
        if self.plans is not None:
            found = self.plans.get(layer)
            told = {"config": AnchorConfig(theta=float("inf"))} if found is None else {"plan": found}
        out, stats = anchor_attention(q, k, v, scale=scale, return_stats=True, **told, **where)
        stats.theta = None if self.plans is not None else config.theta
        if not self.keep_plans:
            stats.plan = None
        self.calls[layer] = stats
        return out

    def _of(self, layer: int) -> AnchorConfig:
        return self.config.layer(layer) if isinstance(self.config, TunedConfig) else self.config

    def spread(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        group: Any,
        layout: Layout,
        kv_layout: Layout | None,
        mask: Mask,
        scale: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """The same where rows are spread over ranks (`tokenring.integrations.huggingface.prefill_with`)."""
        if mask != Mask.causal():
            raise ValueError(_cannot(f"the mask of layer {layer}"))
        _refuse({"softcap": softcap, "sinks": sinks})
        if self.plans is not None:
            raise ValueError(
                "plans= are for one device; leave them out inside sequence_parallel, or leave its block first"
            )
        return self.attend(layer, q, k, v, scale, group=group, layout=layout, kv_layout=kv_layout)


@contextmanager
def sparse_prefill(
    model: nn.Module,
    config: AnchorConfig | TunedConfig | None = None,
    exact_below: int = 16,
    *,
    keep: Numbers | None = None,
    plans: Mapping[int, StripePlan] | None = None,
    density: float | None = None,
    keep_plans: bool = False,
    watch: Callable[[int, Tensor, Tensor, float | None], None] | None = None,
) -> Iterator[dict[int, Stats]]:
    """Inside the block the model's attention is `anchor_attention`; yields the stats of each layer's last prefill.

    Inside `tokenring.integrations.huggingface.sequence_parallel` rows are spread over ranks: prompts, on top of a cache too, are
    attended to with only the wanted rows travelling, and new tokens by `tokenring.decode_attention`. Stripes travel least
    where each rank holds whole groups: give `sequence_parallel` a `sparse_attn.distributed.group_layout`.

    Args:
        model: a transformers model whose causal attention goes through its AttentionInterface: Llama, Qwen2, Qwen3, SmolLM
            and others; of models that see (Qwen2.5-VL, Qwen3-VL, LLaVA-OneVision) the language model.
        config: one for all layers, or what `tune` found.
        exact_below: calls with fewer new rows than this use dense attention: decoding (spread rows: `cut_from` decides).
        keep: rows of the prompt that every later group sees, for example visual tokens.
        plans: these columns for a prompt given whole, a layer each, instead of config; a layer without one is dense.
        density: instead of a theta the share of causal pairs to compute; each layer's theta is estimated at each prefill
            (`sparse_attn.theta_for_density`).
        keep_plans: leave `plan` in the stats: its columns take memory in every layer.
        watch: called with layer, q (B, S, Hq, D), k (B, S, Hkv, D) and scale of each prefill, this rank's rows.

    Raises:
        ValueError: a model or call that cannot be honoured: windows, padding, masks other than causal, soft-capping, sinks.
    """
    text_model, modules = find_decoder(model)
    if "sliding_attention" in (getattr(text_model.config, "layer_types", None) or ()):
        raise ValueError(
            f"{type(model).__name__} has layers with a sliding window, and {_cannot('a window')}; use the model's own attention"
        )
    _check(config, exact_below, keep, plans, density, len(modules))
    config = AnchorConfig() if config is None else config
    prefill = _Prefill(config, exact_below, keep, plans, keep_plans, density, watch)
    with ExitStack() as undo:
        if not undo.enter_context(prefill_with(model, prefill.spread)):
            AttentionInterface.register(NAME, _attention)
            AttentionMaskInterface.register(NAME, _mask)
            undo.callback(text_model.set_attn_implementation, text_model.config._attn_implementation)
            text_model.set_attn_implementation(NAME)
            for module in modules:
                undo.callback(_put_back, module, getattr(module, _ATTRIBUTE, None))
                setattr(module, _ATTRIBUTE, prefill)
        yield prefill.calls


def _check(
    config: Any, exact_below: Any, keep: Numbers | None, plans: Mapping[int, Any] | None, density: Any, layers: int
) -> None:
    """ValueError for options of `sparse_prefill` that mean nothing, or two things."""
    if config is not None and not isinstance(config, AnchorConfig | TunedConfig):
        raise ValueError(f"config is {config!r}; give an AnchorConfig, or the TunedConfig that tune returns")
    if not isinstance(exact_below, int) or exact_below < 0:
        raise ValueError(f"exact_below is {exact_below!r}; give a whole number of rows, 0 or more")
    if plans is not None and any(told is not None for told in (config, keep, density)):
        raise ValueError("got plans= and config=, keep= or density=; a plan says these itself: leave them out")
    unknown = sorted(set(plans or ()) - set(range(layers)), key=str)
    if unknown:
        raise ValueError(f"got plans= for layers {unknown}; the model has layers 0 to {layers - 1}")
    if density is not None and isinstance(config, TunedConfig):
        raise ValueError("got density= and thetas that were tuned; give one of them")


def _put_back(module: nn.Module, before: _Prefill | None) -> None:
    if before is None:
        delattr(module, _ATTRIBUTE)
    else:  # of a block around this one
        setattr(module, _ATTRIBUTE, before)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    prefill: _Prefill | None = getattr(module, _ATTRIBUTE, None)
    if prefill is None:
        raise ValueError('attention "sparse_attn" was called outside its block; use `with sparse_prefill(model): ...`')
    _refuse({"attention_mask": attention_mask, "dropout": dropout or None})
    _refuse({name: options.get(name) for name in ("sliding_window", "softcap", "s_aux", "sinks")})
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if q.shape[1] < prefill.exact_below:
        return anchor_attention(q, k, v, config=AnchorConfig(theta=float("inf")), scale=scaling), None
    return prefill.attend(int(module.layer_idx), q, k, v, scaling), None  # type: ignore[arg-type]


def _refuse(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{_cannot(name)}; leave it out, or use the model's own attention")


def _cannot(what: str) -> str:
    return f"sparse prefill cannot honour {what}: it is causal attention and nothing else"


def _mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> None:
    end = int(q_offset) + int(q_length)
    if kv_offset or int(kv_length) != end:
        raise ValueError(
            f"sparse prefill got keys {kv_offset} to {kv_offset + int(kv_length)} from the cache for rows up to {end}: a cache "
            "of fixed length, whose last rows are empty, or of a window; use a DynamicCache, which is transformers' own choice"
        )
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("sparse prefill got padding; prefill each prompt by itself, or pack them with cu_seqlens")
    if mask_function is not causal_mask_function:
        raise ValueError("sparse prefill honours causal attention only, and the model asks for another mask")

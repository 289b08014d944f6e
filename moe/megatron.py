"""Our dispatchers inside Megatron-Core's mixture-of-experts layer; Megatron itself is not changed.

    spec = layer_spec(config, dispatcher="dedup")                                   a transformer layer
    spec = with_moe(get_gpt_layer_local_spec(num_experts=8), dispatcher="dedup")    any spec of your own
    layer.mlp.token_dispatcher = TokenDispatcher(config, pg_collection, "dedup")    a layer that is built already

`MoELayer` here is a subclass of Megatron's, so everything that tests for that still finds it: routers, experts, shared experts,
latent projections, recomputation, losses and checkpoints are Megatron's own. The dispatcher keeps to the six stages: only
`token_dispatch` and `token_combine` communicate, so schedules that move those to a side stream work. Uneven tokens, no tokens,
ETP > 1 without dropping, and capacities above T are ordinary. Refused: CUDA graphs (sizes follow the data).

On CPUs Megatron's router asks for a CUDA device; the one in these specs stays where its input is.
Written for megatron-core 0.16.1 to 0.19.2: 0.18 and later build layers through functools.partial, which `with_moe` follows.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from moe.dispatch import Dispatched, build_dispatcher
from tokenring.topology import Topology

__all__ = ["MoELayer", "TokenDispatcher", "TokenRouter", "layer_spec", "with_moe"]


class TokenDispatcher(MoETokenDispatcher):
    """Megatron's six stages around one of our dispatchers.

    Args:
        config: Megatron's TransformerConfig.
        pg_collection: with `ep`, `expt_tp` and `tp_ep`.
        dispatcher, ranks_per_node, topology: as in `moe.build_dispatcher`.
    """

    def __init__(
        self,
        config: Any,
        pg_collection: Any,
        dispatcher: str = "auto",
        *,
        ranks_per_node: int | None = None,
        topology: Topology | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        if getattr(config, "cuda_graph_impl", "none") != "none":
            raise ValueError(
                f"config.cuda_graph_impl is {config.cuda_graph_impl!r}; these dispatchers' sizes follow the data: give 'none'"
            )
        # rows may be routed to more than k experts where Megatron fills experts up
        filled = config.moe_pad_expert_input_to_capacity
        self.topk = config.num_moe_experts if filled else config.moe_router_topk
        align = 1
        if getattr(config, "moe_router_padding_for_quantization", False):
            align = moe_utils.get_align_size_for_quantization(config)
        self.dispatcher = build_dispatcher(
            dispatcher,
            num_experts=config.num_moe_experts,
            ep_group=self.ep_group,
            etp_group=self.tp_group,
            ranks_per_node=ranks_per_node,
            topology=topology,
            align=align,
        )
        self._shape: torch.Size | None = None
        self._ids: Tensor | None = None
        self._dispatched: Dispatched | None = None

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """(S, B, H), bool (T, E), (T, E) -> rows (T, H) and weights (T, k)."""
        self._shape = hidden_states.shape
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden.view(self._shape))
        self._ids = chosen_ids(routing_map, self.topk)
        weights = probs.gather(1, self._ids.clamp_min(0)).masked_fill(self._ids < 0, 0.0)
        return hidden, weights

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Rows to their experts."""
        self._dispatched = self.dispatcher.dispatch(hidden_states, self._ids, probs)
        return self._dispatched.tokens, self._dispatched.weights

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nothing is left to do: (tokens, tokens_per_expert on the CPU, weights)."""
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(hidden_states)
        return hidden_states, self._dispatched.tokens_per_expert.cpu(), probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Sums are taken while they are sent."""
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(hidden_states)
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Sums home; the experts have applied the weights."""
        dispatched, self._dispatched = self._dispatched, None
        if self.shared_experts is not None:
            self.shared_experts.post_forward_comm()
        return self.dispatcher.combine(hidden_states, dispatched, weighted=True)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """(T, H) -> (S, B, H), with what shared experts computed beside the exchanges."""
        out = hidden_states.view(self._shape)
        return out if self.shared_experts is None else out + self.shared_experts.get_output()

    def get_expert_zero_copy_buffers(self) -> tuple[None, None]:
        """None: experts make their own buffers (asked for by 0.19 and later)."""
        return None, None


def chosen_ids(routing_map: Tensor, topk: int) -> Tensor:
    """Expert ids (T, topk), ascending, -1 where a row has fewer, of a bool map (T, E).

    >>> chosen_ids(torch.tensor([[True, False, True], [False, True, False]]), 2).tolist()
    [[0, 2], [1, -1]]
    """
    counts = routing_map.sum(dim=1)
    if counts.numel() and int(counts.max()) > topk:
        raise ValueError(f"a row of the routing map names {int(counts.max())} experts; at most {topk} are configured")
    row, expert = routing_map.nonzero(as_tuple=True)
    slot = torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[row]
    ids = torch.full((routing_map.shape[0], topk), -1, dtype=torch.int64, device=row.device)
    ids[row, slot] = expert
    return ids


class TokenRouter(TopKRouter):
    """Megatron's router; on CPUs it computes its logits where its input is."""

    def gating(self, input: Tensor) -> Tensor:
        """Logits in the router's dtype."""
        if input.is_cuda:
            return super().gating(input)
        wide = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, input.dtype)
        bias = None if self.bias is None else self.bias.to(wide)
        return torch.nn.functional.linear(input.to(wide), self.weight.to(wide), bias)


class MoELayer(MegatronMoELayer):
    """Megatron's layer with one of our dispatchers.

    Args:
        config, submodules, layer_number, pg_collection: Megatron's.
        dispatcher, ranks_per_node, topology: as in `moe.build_dispatcher`.
        newer: what later versions of Megatron give their layers besides.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        *,
        dispatcher: str = "auto",
        ranks_per_node: int | None = None,
        topology: Topology | None = None,
        **newer: Any,
    ) -> None:
        if pg_collection is None:
            pg_collection = moe_utils.get_default_pg_collection()
        named = config.moe_token_dispatcher_type
        config.moe_token_dispatcher_type = "allgather"  # whose constructor touches no CUDA device; it is replaced below
        try:
            super().__init__(config, submodules, layer_number, pg_collection, **newer)
        finally:
            config.moe_token_dispatcher_type = named
        self.token_dispatcher = TokenDispatcher(
            config, pg_collection, dispatcher, ranks_per_node=ranks_per_node, topology=topology
        )
        if self.use_shared_expert and self.shared_expert_overlap:
            self.token_dispatcher.set_shared_experts(self.shared_experts)


def with_moe(spec: Any, **options: Any) -> Any:
    """A copy of a spec in which every MoELayer is ours; the given one stays as it is.

    Args:
        spec: a ModuleSpec, block spec, or partial that holds Megatron's MoELayer.
        options: `dispatcher`, `ranks_per_node`, `topology`.
    """
    done: list[str] = []
    copy = _swap(spec, options, None, done)
    if "mlp" not in done:
        raise ValueError(
            f"{type(spec).__name__} holds no MoELayer; build the spec with num_experts (config.num_moe_experts)"
        )
    return copy


def layer_spec(
    config: Any, dispatcher: str = "auto", core_attention: Any = None, *, backend: str | None = None, **options: Any
) -> Any:
    """A transformer layer of Megatron with our MoE layer and, if given, another core attention inside.

    Args:
        config: TransformerConfig with `num_moe_experts`.
        dispatcher, options: as in `with_moe`.
        core_attention: a spec for `self_attention.submodules.core_attention`, for instance tokenring's; None: Megatron's.
        backend: "local" or "transformer_engine"; None: the latter where it is installed.
    """
    if config.num_moe_experts is None:
        raise ValueError("config.num_moe_experts is None; give the number of experts")
    backend = backend or ("transformer_engine" if HAVE_TE else "local")
    makers = {"local": "get_gpt_layer_local_spec", "transformer_engine": "get_gpt_layer_with_transformer_engine_spec"}
    if backend not in makers:
        raise ValueError(f"backend is {backend!r}; give one of {', '.join(makers)}")
    if backend == "transformer_engine" and not HAVE_TE:
        raise ValueError("backend 'transformer_engine' needs that package, which cannot be imported; give 'local'")
    make = getattr(gpt_layer_specs, makers[backend])
    wanted = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
        "multi_latent_attention": config.multi_latent_attention,
        "normalization": config.normalization,
    }
    known = inspect.signature(make).parameters
    spec = make(**{name: value for name, value in wanted.items() if name in known})
    done: list[str] = []
    spec = _swap(spec, {"dispatcher": dispatcher, **options}, core_attention, done)
    if core_attention is not None and "core_attention" not in done:
        raise ValueError("the layer's spec has no core_attention to replace; give core_attention=None")
    return spec


def _swap(part: Any, options: dict[str, Any], attention: Any, done: list[str]) -> Any:
    """Parts in which nothing is replaced are the given ones, not copies."""
    if isinstance(part, (list, tuple)):
        items = [_swap(x, options, attention, done) for x in part]
        return type(part)(items) if any(a is not b for a, b in zip(items, part)) else part
    if isinstance(part, functools.partial):
        if part.func is MegatronMoELayer:
            done.append("mlp")
            keywords = part.keywords | {"submodules": _with_router(part.keywords["submodules"])}
            return functools.partial(MoELayer, *part.args, **keywords | options)
        keywords = {name: _swap(value, options, attention, done) for name, value in part.keywords.items()}
        changed = any(value is not part.keywords[name] for name, value in keywords.items())
        return functools.partial(part.func, *part.args, **keywords) if changed else part
    if isinstance(part, ModuleSpec) and part.module is MegatronMoELayer:
        done.append("mlp")
        params = part.params | options
        return dataclasses.replace(part, module=MoELayer, params=params, submodules=_with_router(part.submodules))
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return part
    fields = {}
    for name in (f.name for f in dataclasses.fields(part) if f.init):
        value = getattr(part, name)
        swapped = _swap(value, options, attention, done)
        if name == "core_attention" and attention is not None:
            done.append(name)
            swapped = attention
        if swapped is not value:
            fields[name] = swapped
    return dataclasses.replace(part, **fields) if fields else part


def _with_router(submodules: Any) -> Any:
    """Megatron's own router becomes ours; another one stays."""
    plain = getattr(submodules, "router", None) is TopKRouter
    return dataclasses.replace(submodules, router=TokenRouter) if plain else submodules

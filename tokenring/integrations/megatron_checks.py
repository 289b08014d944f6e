"""What the Megatron core attention refuses, and which schedule a `cp_comm_type` asks for. Nothing here imports Megatron."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from tokenring.layout import Layout
from tokenring.mask import Mask

CAUSAL = ("causal", "padding_causal", "causal_bottom_right")
FULL = ("no_mask", "padding")
PACKED_LAYOUTS = ("documents", "sequence")
_SCHEDULE_OF = {"p2p": "ring", "all_gather": "gather", "allgather": "gather", "a2a": "ulysses"}
_REFUSED_FLAGS = {
    "fp8_dot_product_attention": "attention in 8 bits",
    "fp8_multi_head_attention": "attention in 8 bits",
    "qk_clip": "the largest attention logit, which is never held here",
    "log_max_attention_logit": "the largest attention logit, which is never held here",
    "batch_invariant_mode": "sums whose order does not depend on the batch",
}
_LAYER_FLAGS = ("qk_layernorm", "qk_l2_norm", "multi_latent_attention", "num_moe_experts")
_ROWS_AT_ONCE = 1024
_COMPARED = "_tokenring_compared"


def schedules(
    cp_comm_type: str | None, schedule: str | None, backward_schedule: str | None, hierarchy: Any
) -> tuple[str, str]:
    """(forward, backward) schedule names. An explicit schedule wins over `cp_comm_type`, which may itself be one.

    >>> schedules("p2p", None, None, None), schedules(None, None, None, None), schedules("a2a", "tokenring", None, None)
    (('ring', 'ring'), ('auto', 'auto'), ('tokenring', 'tokenring'))
    """
    if cp_comm_type is not None and not isinstance(cp_comm_type, str):
        raise ValueError(f"cp_comm_type is {cp_comm_type!r}; one layer takes one name, such as p2p")
    if schedule is None and cp_comm_type == "a2a+p2p":
        if not hierarchy or len(hierarchy) != 2:
            raise ValueError(
                "cp_comm_type a2a+p2p needs two hierarchical context parallel groups, all-to-all first: set "
                "hierarchical_context_parallel_sizes, or give the schedule itself, such as usp:2x4"
            )
        schedule = "usp:" + "x".join(str(group.size()) for group in hierarchy)
    forward = schedule or _SCHEDULE_OF.get(cp_comm_type or "auto", cp_comm_type or "auto")
    return forward, backward_schedule or forward


def check_config(config: Any, dropout: float, packed_layout: str, layer_has: Any) -> None:
    """Refuse, when a layer is built, what no call of it could honour."""
    if dropout > 0:
        raise ValueError(
            f"attention_dropout is {dropout} (Megatron's default is 0.1) and sequence-parallel attention has none; "
            "set attention_dropout=0, --attention-dropout 0"
        )
    for flag, asks in _REFUSED_FLAGS.items():
        if getattr(config, flag, False):
            raise ValueError(f"{flag} asks for {asks}; switch it off, or keep Megatron's own core attention")
    if packed_layout not in PACKED_LAYOUTS:
        raise ValueError(f"packed_layout is {packed_layout!r}; give one of {', '.join(PACKED_LAYOUTS)}")
    backend = getattr(getattr(config, "attention_backend", None), "name", "auto")
    if backend not in ("auto", "local"):
        warnings.warn(
            f"attention_backend {backend} chooses among the kernels of Megatron's own attention and changes nothing "
            "here; tokenring's kernel is chosen by kernel= in its spec",
            stacklevel=3,
        )
    if layer_has is not None:
        _check_layer(config, frozenset(layer_has))


def _check_layer(config: Any, layer_has: frozenset[str]) -> None:
    wanted = {flag for flag in _LAYER_FLAGS if getattr(config, flag, None)}
    if wanted != layer_has:
        odd = min(wanted ^ layer_has)
        sets, built = ("sets", "without") if odd in wanted else ("does not set", "with")
        raise ValueError(
            f"the config {sets} {odd} and this ready spec was built {built} it; "
            "build your own, with_tokenring(get_gpt_layer_local_spec(...))"
        )


def check_mask_type(mask_type: str) -> None:
    if mask_type not in CAUSAL + FULL:
        raise ValueError(
            f"attn_mask_type {mask_type} cannot be honoured, mask tensors are never sent around; "
            f"give one of {', '.join(CAUSAL + FULL)}"
        )


def window(size: Any) -> tuple[int, int] | None:
    """(left, right) of `config.window_size`, -1 for no bound; None where both are."""
    pair = tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(pair) != 2 or any(not isinstance(n, int) or n < -1 for n in pair):
        raise ValueError(f"window_size is {size!r}; give (left, right) in rows, -1 for no bound")
    return None if pair == (-1, -1) else pair


def call_group(params: Any, group: Any) -> Any:
    """The group of one call: PackedSeqParams may name another (dynamic context parallelism), or none with a size of 1."""
    given, size = getattr(params, "cp_group", None), getattr(params, "local_cp_size", None)
    if size is not None and int(size) != (1 if given is None else given.size()):
        has = "no cp_group" if given is None else f"a cp_group of {given.size()} ranks"
        raise ValueError(f"packed_seq_params has local_cp_size {int(size)} and {has}; they must agree (1: no group)")
    return group if given is None and size is None else given


def check_call(query: Tensor, key: Tensor, value: Tensor, mask_type: str, bias: Tensor | None, params: Any) -> None:
    """What one call says apart from its lengths."""
    check_mask_type(mask_type)
    if bias is not None:
        raise ValueError(f"attention_bias {tuple(bias.shape)} cannot be honoured; use rotary or no position embedding")
    form = getattr(params, "qkv_format", None) or "sbhd"
    if form not in ("sbhd", "thd"):
        raise ValueError(f"qkv_format is {form!r}; give sbhd or thd")
    if any(x.dim() != (3 if form == "thd" else 4) for x in (query, key, value)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        wanted = "(t, heads, head dim)" if form == "thd" else "(s, b, heads, head dim)"
        raise ValueError(f"query, key, value are {shapes}; qkv_format {form} is {wanted}")


def check_lengths(rows: int, keys: int, mask_type: str, attention_type: str, world: int) -> None:
    """Queries and keys of unlike number: cross-attention, or new tokens against a cache on one rank."""
    if rows == keys or (mask_type in FULL and (world == 1 or attention_type == "cross")):
        return
    if world == 1 and (rows == 1 or mask_type == "causal_bottom_right"):
        return
    raise ValueError(
        f"{rows} rows of queries and {keys} of keys on each of {world} ranks under attn_mask_type {mask_type}; they must be "
        "equally many (a cache of earlier keys works without context parallelism only)"
    )


def check_no_mask(tensor: Tensor | None) -> None:
    """Packed documents come from cu_seqlens; one element stands for no mask in some data loaders (NeMo's)."""
    if tensor is not None and tensor.numel() != 1:
        raise ValueError(
            f"attention_mask is {tuple(tensor.shape)} beside packed documents, which cu_seqlens_q names; give None"
        )


def with_attention_mask(
    mask: Mask, tensor: Tensor | None, mask_type: str, batch: int, q_layout: Layout, kv_layout: Layout, rank: int
) -> Mask:
    """The mask of the call, given Megatron's own mask tensor (True: not attended to) or None.

    For the padding types, a tensor (b, 1, 1, global keys) with padding at the end of its rows joins the mask. Any other
    must be (b, 1, local queries, global keys) and say what `mask_type` says: it is compared, once, and not used.
    """
    if tensor is None:
        return mask
    shape, rows, keys = tuple(tensor.shape), q_layout.length(rank), kv_layout.total
    padding = mask_type.startswith("padding") and shape[1:] == (1, 1, keys)
    if tensor.dtype != torch.bool or shape[0] not in (1, batch) or not (padding or shape[1:] == (1, rows, keys)):
        raise ValueError(
            f"attention_mask is {shape} {tensor.dtype}; give None, or bools (b, 1, {rows}, {keys}) that say what "
            f"attn_mask_type {mask_type} says, True where not attended to"
        )
    if padding:
        return mask & _key_padding(tensor[:, 0, 0].expand(batch, -1))
    meant = (None if tensor.is_inference() else tensor._version, mask, q_layout, kv_layout)
    if meant[0] is None or getattr(tensor, _COMPARED, None) != meant:
        _compare(mask, tensor, mask_type, q_layout.positions(rank), kv_layout)
        setattr(tensor, _COMPARED, meant)
    return mask


def _key_padding(padding: Tensor) -> Mask:
    lengths = (~padding).sum(-1)
    if not torch.equal(padding, torch.arange(padding.shape[1], device=padding.device) >= lengths[:, None]):
        raise ValueError(
            "attention_mask has padding before the end of a row; only the last keys of a row can be padding"
        )
    return Mask.lengths(lengths.tolist())


def _compare(mask: Mask, tensor: Tensor, mask_type: str, q_at: Tensor, kv_layout: Layout) -> None:
    k_at = torch.arange(kv_layout.offset, kv_layout.offset + kv_layout.total)
    for first in range(0, q_at.numel(), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        meant = ~mask.dense(q_at[rows], k_at).to(tensor.device)
        if not bool((tensor[:, 0, rows] == meant).all()):
            raise ValueError(
                f"attention_mask differs from what attn_mask_type {mask_type} says; give attention_mask=None where they "
                "agree, and packed_seq_params where documents are packed"
            )

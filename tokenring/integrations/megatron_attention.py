"""The core attention that Megatron builds and calls; `tokenring.integrations.megatron` is where it is put into specs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

import tokenring as tr
from tokenring.agreement import refuse
from tokenring.integrations import megatron_checks as checks
from tokenring.integrations.megatron_packing import check_one_sequence, packed, sequence_layout
from tokenring.layout import Layout
from tokenring.topology import Topology
from tokenring.transport import connect


class TokenRingAttention(MegatronModule):
    """Exact attention over the context parallel group, in the place of Megatron's core attention.

        out = softmax(softmax_scale * query key^T + mask) value

    Built by Megatron (see `with_tokenring`), which gives the arguments before the star. Parameters: none, or
    `softmax_offset` (local heads,) where `config.softmax_type` is learnable, under Megatron's own name in checkpoints.

    Args:
        config: attention_dropout must be 0. `apply_query_key_layer_scaling` divides and multiplies by the same number, so
            it changes nothing here, where scores are never held in 16 bits.
        attn_mask_type: causal, padding_causal, causal_bottom_right, no_mask or padding; a call may name another.
        attention_type: "self", or "cross" (no_mask and padding only).
        k_channels, v_channels: head dims, which Megatron's latent attention gives; those of the tensors are taken.
        cp_comm_type: Megatron's name, or a schedule's (see the table in `tokenring.integrations.megatron`).
        pg_collection: its `cp` is used where `config.context_parallel_size` is above 1.
        schedule, backward_schedule: as in `tokenring.attention`; where not given, `cp_comm_type` says, and the backward
            schedule is that of the forward pass.
        kernel, partial_dtype, topology: as in `tokenring.attention`.
        packed_layout: how the data loader cuts packed documents: "documents", each by itself (Transformer Engine's cut, and
            the only one that Megatron's rotary embedding knows), or "sequence", the whole stream once (Megatron's
            `use_per_sequence_balancing`).
        layer_has: which of qk_layernorm, qk_l2_norm, multi_latent_attention, num_moe_experts the spec around this was
            built with; the config must then say the same. None: nothing is checked.
        prepare: agree with the other ranks once on each new shape instead of in every call (see `tokenring.prepare`), which
            spares a wait for a header in every layer; a rank that is given another shape than its peers is then found by
            their time-out. Packed documents, which differ from call to call, are agreed on in every call.

    Raises:
        ValueError: for what cannot be honoured; in a call also on the other ranks of the group (AgreementError there).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        schedule: str | None = None,
        backward_schedule: str | None = None,
        kernel: str = "auto",
        partial_dtype: str | torch.dtype = "input",
        topology: Topology | None = None,
        packed_layout: str = "documents",
        layer_has: Sequence[str] | None = None,
        prepare: bool = False,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        checks.check_config(config, dropout, packed_layout, layer_has)
        checks.check_mask_type(attn_mask_type.name)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.pg_collection, self.tp_group = pg_collection, getattr(pg_collection, "tp", None)
        self.cp_group = _context_parallel_group(config, pg_collection)
        hierarchy = _hierarchy(pg_collection) if cp_comm_type == "a2a+p2p" else None
        self.schedules = checks.schedules(cp_comm_type, schedule, backward_schedule, hierarchy)
        self.attn_mask_type, self.attention_type = attn_mask_type, attention_type
        self.softmax_scale, self.packed_layout, self.prepare = softmax_scale, packed_layout, prepare
        self.kernel, self.partial_dtype, self.topology = kernel, partial_dtype, topology
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, max(1, layer_number))
        self.window = checks.window(config.window_size) if windowed else None
        self._make_softmax_offset()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """This rank's rows in, this rank's rows out.

        query (s, b, heads, head dim), key and value (s, b, key heads, ...) -> (s, b, heads * value head dim); packed, format
        thd: (t, heads, head dim) -> (t, heads * value head dim).
        """
        mask_type = (attn_mask_type or self.attn_mask_type).name
        group = checks.call_group(packed_seq_params, self.cp_group)
        runtime = connect(group)
        thd = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        try:
            checks.check_call(query, key, value, mask_type, attention_bias, packed_seq_params)
            cut = self._packed if thd else self._sequence
            layout, kv_layout, mask = cut(query, key, mask_type, packed_seq_params, runtime.world)
            if thd:
                checks.check_no_mask(attention_mask)
            else:
                cuts = (query.shape[1], layout, kv_layout, runtime.rank)
                mask = checks.with_attention_mask(mask, attention_mask, mask_type, *cuts)
        except ValueError as error:
            if thd or not self.prepare:
                refuse(runtime, error)
            raise
        how = {"layout": layout, "kv_layout": None if kv_layout == layout else kv_layout, "mask": mask}
        q, k, v = (x.unsqueeze(0) if thd else x.transpose(0, 1) for x in (query, key, value))
        out = self._attend(q, k, v, group, how, prepare=self.prepare and not thd)
        return out[0].flatten(1) if thd else out.transpose(0, 1).flatten(2).contiguous()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, group: Any, how: dict[str, Any], prepare: bool) -> Tensor:
        runtime = connect(group)
        schedule, backward_schedule = ("auto", "auto") if runtime.world == 1 else self.schedules
        how = how | {"schedule": schedule, "topology": self.topology}
        if prepare and runtime.world > 1:
            totals = (how["layout"].total, (how["kv_layout"] or how["layout"]).total)
            shape = tr.AttentionShape(q.shape[0], *totals, q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype)
            plan = tr.plan(world=runtime.world, shape=shape, **how)
            if plan not in runtime.prepared:
                tr.prepare(group, plan)
            how = {"plan": plan, "topology": self.topology}
        return tr.attention(
            q,
            k,
            v,
            group=group,
            backward_schedule=backward_schedule,
            partial_dtype=self.partial_dtype,
            scale=self.softmax_scale,
            sinks=self.softmax_offset,
            kernel=self.kernel,
            **how,
        )

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The learnable softmax offset, cut over tensor parallel ranks as Megatron's own core attention saves it."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )

    def _packed(
        self, query: Tensor, key: Tensor, mask_type: str, params: PackedSeqParams, world: int
    ) -> tuple[Layout, Layout, tr.Mask]:
        rows = (query.shape[0], key.shape[0])
        layout, kv_layout, mask = packed(params, rows, world, self.packed_layout, mask_type in checks.CAUSAL)
        return layout, kv_layout, self._windowed(mask, kv_layout.total)

    def _sequence(
        self, query: Tensor, key: Tensor, mask_type: str, params: PackedSeqParams | None, world: int
    ) -> tuple[Layout, Layout, tr.Mask]:
        rows, keys = query.shape[0], key.shape[0]
        if params is not None:
            check_one_sequence(params, query.shape[1], rows * world)
        checks.check_lengths(rows, keys, mask_type, self.attention_type, world)
        mask = tr.Mask.causal() if mask_type in checks.CAUSAL else tr.Mask.full()
        return sequence_layout(rows, world), sequence_layout(keys, world), self._windowed(mask, keys * world)

    def _windowed(self, mask: tr.Mask, keys: int) -> tr.Mask:
        if self.window is None:
            return mask
        left, right = (keys if n < 0 else n for n in self.window)
        return mask & tr.Mask.window(left, right)

    def _make_softmax_offset(self) -> None:
        """One logit a local head. All heads are drawn and cut, so that tensor parallel ranks differ as one rank's heads do."""
        config, kind = self.config, self.config.softmax_type
        world, rank = (1, 0) if self.tp_group is None else (self.tp_group.size(), self.tp_group.rank())
        local = config.num_attention_heads // world
        if kind == "vanilla":
            self.softmax_offset = None
        elif kind == "off-by-one":
            self.register_buffer("softmax_offset", torch.zeros(local, device=_device(config)), persistent=False)
        else:
            offset = torch.zeros(local * world, dtype=config.params_dtype, device=_device(config))
            if config.perform_initialization:
                config.init_method(offset)
            self.softmax_offset = torch.nn.Parameter(offset[rank * local : (rank + 1) * local].clone())
            tensor_parallel.set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)


def _device(config: TransformerConfig) -> Any:
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()


def _context_parallel_group(config: TransformerConfig, pg_collection: ProcessGroupCollection) -> Any:
    if config.context_parallel_size == 1:
        return None
    group = getattr(pg_collection, "cp", None)
    if group is None:
        raise ValueError(
            f"context_parallel_size is {config.context_parallel_size} and pg_collection has no cp group; call "
            "initialize_model_parallel first, or give a ProcessGroupCollection with cp"
        )
    return group


def _hierarchy(pg_collection: ProcessGroupCollection) -> Any:
    own = getattr(pg_collection, "hcp", None)
    return own or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["hcp"]).hcp

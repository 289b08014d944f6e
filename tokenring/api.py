"""The call users make: `attention`, and its gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenring import call as calls
from tokenring.agreement import refuse
from tokenring.call import Call
from tokenring.layout import Layout
from tokenring.mask import Mask
from tokenring.operators import group_name, plain, spec_text
from tokenring.plans.plan import Plan
from tokenring.transport import Transport, connect

if TYPE_CHECKING:
    from tokenring.topology import Topology


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    layout: Layout | str = "zigzag",
    kv_layout: Layout | str | None = None,
    mask: Mask | str = "causal",
    schedule: str = "auto",
    backward_schedule: str = "auto",
    partial_dtype: str | torch.dtype | None = None,
    topology: Topology | None = None,
    plan: Plan | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    kernel: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a sequence that is spread over the ranks of a group.

        out = softmax(scale * q k^T + mask) v,   lse = log sum exp(scale * q k^T + mask)

    Args:
        q: (B, Sq_local, Hq, D), this rank's queries in the order of `layout.positions(rank)`.
        k: (B, Skv_local, Hkv, D), v: (B, Skv_local, Hkv, Dv); Hq a multiple of Hkv, never expanded on the wire.
        group: ProcessGroup, 1-D DeviceMesh, LocalGroup, or None for one rank.
        layout: a Layout, or a name where every rank holds equally many rows.
        kv_layout: where keys and values are cut differently from queries (then see `tokenring.plan` for the alignment).
        mask: "causal", "full" or a Mask.
        schedule: "auto" or a schedule's name (see `tokenring.plan`).
        plan: layout, mask and schedule in one: one plan serves every layer of a batch. Leave the others at their defaults.
            For `torch.compile` also a plan as a tensor (see `tokenring.plan_tensor`): another batch needs no new graph.
        backward_schedule: "auto" or a name, whatever the forward schedule is.
        partial_dtype: "input" (default), "float32" or a dtype: in which partial gradients travel straight to their owner, who
            adds them in float32 (float64 for float64).
        topology: the links, for "auto"; where not given it counts bytes.
        scale: 1 / sqrt(D) where not given.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: (Hq,), the logit of one virtual key of value 0 per head.
        dropout: 0; anything above is refused, because no two schedules would drop the same weights.
        kernel: "auto", "reference", on CPUs "cpu_flash", on GPUs "cuda_sdpa" or "flash_attn" ("flash_attn2", 3, 4 for one
            version); `tokenring.trace` says which ran. On GPUs gradients repeat bit for bit only under
            `torch.use_deterministic_algorithms(True)`.
        return_lse: also return lse.

    Returns:
        out (B, Sq_local, Hq, Dv) in q's dtype; with `return_lse` also lse (B, Hq, Sq_local), float32 (float64 for
        float64), natural log, the sink included. A row that may attend to nothing gives zeros and lse = -inf.

    Differentiable once in q, k, v and sinks; the gradient of `sinks` is this rank's share, to be summed over the group. lse is
    not differentiable. The backward pass is a call of its own: all ranks of the group make it, or none.

    `torch.compile` takes it whole, over process groups, meshes and one rank; `tokenring.checkpoint` keeps it from being sent
    again where activations are recomputed. Autocast leaves it alone: out is in the dtype that q has.

    Raises:
        ValueError: for arguments that do not fit, before any payload is sent; AgreementError on the other ranks, and on
            all where ranks disagree (see `tokenring.agreement`).
        TransportError: a transfer failed or timed out.

    >>> q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
    >>> attention(q, k, v).shape
    torch.Size([1, 6, 4, 8])
    """
    options = {
        "layout": layout,
        "kv_layout": kv_layout,
        "mask": mask,
        "schedule": schedule,
        "backward_schedule": backward_schedule,
        "partial_dtype": partial_dtype,
        "topology": topology,
        "plan": plan,
        "dropout": dropout,
        "kernel": kernel,
    }
    if torch.compiler.is_compiling():
        from tokenring.compiled import attention_in_graph

        out, lse = attention_in_graph(q, k, v, sinks, group, scale, softcap, options)
    else:
        out, lse = _attend(q, k, v, sinks, group, scale, softcap, options)
    return (out, lse) if return_lse else out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    group: Any,
    scale: float | None,
    softcap: float | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Straight to autograd; through the operator where someone watches operators, so that they see one and not its inside."""
    if (torch._C._len_torch_dispatch_stack() or not plain(q, k, v)) and (name := group_name(group)) is not None:
        packed = options["plan"] if isinstance(options["plan"], Tensor) else None
        try:
            spec = spec_text(options if packed is None else options | {"plan": None})
        except ValueError as error:
            refuse(connect(group), error)
            raise
        return torch.ops.tokenring.attention(q, k, v, sinks, packed, name, spec, scale, softcap)
    return _Attention.apply(q, k, v, sinks, connect(group), Call(**options, scale=scale, softcap=softcap))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, runtime: Transport, call: Call
    ) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse, *ctx.made = calls.forward(call, runtime, q, k, v, sinks)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.runtime = runtime
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *calls.backward(*ctx.made, ctx.runtime, do, *ctx.saved_tensors), None, None

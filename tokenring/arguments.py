"""What the calls refuse, with what was given, what is allowed and how to mend it: before anything is sent."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenring.layout import Layout
from tokenring.mask import Mask
from tokenring.plans.plan import Plan


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """(B, S, H, D) tensors of one dtype and device whose batch, rows, heads and head dims agree."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(x.dim() != 4 for x in (q, k, v)):
        raise ValueError(f"got {shapes}; each must be (batch, rows, heads, head dim)")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"got {shapes}; k and v must be alike in batch, rows and heads, q and k in batch and head dim")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"got {q.shape[2]} query heads and {k.shape[2]} key heads; query heads must be a multiple of key heads"
        )
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1 or not q.is_floating_point():
        raise ValueError(
            f"got q {q.dtype} on {q.device}, k {k.dtype} on {k.device}, v {v.dtype} on {v.device}; give one floating dtype on one device"
        )


def check_options(
    q: Tensor, sinks: Tensor | None, scale: float | None, softcap: float | None, dropout: float = 0.0
) -> None:
    """No dropout. One sink for each query head, beside q; a scale that is a number (torch's flash makes zeros of NaN scores); a cap."""
    if dropout != 0:
        raise ValueError(
            f"dropout is {dropout}; attention over ranks has none, because every schedule would drop other weights. "
            "Set it to 0 (Megatron: --attention-dropout 0)"
        )
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale is {scale}; it must be above 0 and finite, or None for 1 / sqrt(head dim)")
    if sinks is not None and (tuple(sinks.shape) != (q.shape[2],) or sinks.device != q.device):
        raise ValueError(
            f"sinks have shape {tuple(sinks.shape)} on {sinks.device}; "
            f"give one logit for each of the {q.shape[2]} query heads on {q.device}"
        )
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap is {softcap}; it must be above 0 and finite, or None for none")


def wire_dtype(partial_dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of partial gradients on the wire; None for the input's."""
    if partial_dtype in (None, "input"):
        return None
    named = {"float32": torch.float32, "float64": torch.float64}.get(partial_dtype, partial_dtype)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f'partial_dtype is {partial_dtype!r}; give "input", "float32" or a floating dtype')
    return named


def check_mask(mask: Mask, q_layout: Layout, kv_layout: Layout, batch: int) -> None:
    """What a mask says of the sequence must be true of it: where documents end, how far spans reach, how many entries."""
    limits = mask.limits
    q_stop, kv_stop = (cut.offset + cut.total for cut in (q_layout, kv_layout))
    ends = limits.q_stop == q_stop if limits.packed else limits.q_stop is None or limits.q_stop >= q_stop
    if limits.kv_stop not in (None, kv_stop) or not ends:
        raise ValueError(
            f"the mask's documents end at query {limits.q_stop} and key {limits.kv_stop}; the layouts' queries end at "
            f"{q_stop} and keys at {kv_stop}. The last of cu_seqlens must be the length of the sequence"
        )
    if limits.reach > kv_stop:
        raise ValueError(
            f"the mask's spans or lengths reach to position {limits.reach}; the keys end at {kv_stop}. Cut them to the sequence"
        )
    if limits.batch not in (None, batch):
        raise ValueError(f"the mask has lengths for {limits.batch} batch entries; the tensors have {batch}")


def check_given(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    layout: Layout | str,
    kv_layout: Layout | str | None,
    mask: Mask | str,
    schedule: str,
) -> None:
    """Beside a plan, an argument that is not the default must say what the plan says: it would be ignored otherwise."""
    if not isinstance(plan, Plan):
        raise ValueError(f"plan is {plan!r}; give what tokenring.plan returned, or a name as schedule=")
    problem = plan.problem
    said = {
        "layout": layout == "zigzag" or _same_cut(layout, q.shape[1], problem.q_layout),
        "kv_layout": kv_layout is None or _same_cut(kv_layout, k.shape[1], problem.kv_layout),
        "mask": mask == "causal" or Mask.of(mask) == problem.mask,
        "schedule": schedule in ("auto", plan.schedule),
    }
    for name, agrees in said.items():
        if not agrees:
            raise ValueError(f"{name}= differs from that of the plan; leave it out, or build the plan with it")


def _same_cut(layout: Layout | str, rows: int, planned: Layout) -> bool:
    """Apart from the offset, which bottom-right alignment moves."""
    return Layout.of(layout, rows, planned.world).at(planned.offset).runs == planned.runs

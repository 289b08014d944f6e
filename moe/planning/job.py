"""How a model is trained, apart from the mapping: batch, precision, dispatcher, what is sharded, what is computed twice."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from moe.folding import Folding
from moe.planning.hardware import PRECISIONS
from moe.planning.model import ModelConfig
from moe.planning.places import MAPPINGS
from moe.traffic import NAMES as DISPATCHERS

SHARDING = ("optimizer", "parameters")
RECOMPUTE = ("none", "moe", "full")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One way to train; the defaults are Megatron-Core's."""

    global_batch: int
    """Sequences of one step."""
    micro_batch: int = 1
    """Sequences that a rank's data-parallel peer group computes at once."""
    precision: str = "bf16"
    """Of the linear maps: "bf16" or "fp8"."""
    dispatcher: str = "alltoall"
    """One of `moe.traffic`'s; "alltoall", a copy per expert, is Megatron-Core's."""
    mapping: str = "folded"
    """"folded", or "nested": EP inside DP, as before folding."""
    sharding: str = "optimizer"
    """What data parallelism shards: "optimizer" states (ZeRO-1), or all "parameters" (ZeRO-3, FSDP): weights gathered layer by
    layer for each forward and each backward pass, gradients reduced in bf16 after each."""
    sharded_init: bool = False
    """With sharding="parameters": whether weights are made in shards. Otherwise they are made whole first, and must fit so."""
    recompute: str = "auto"
    """What the backward pass computes again: "none", "moe" (the layer's MLP, exchanges included), "full" (layers), or "auto":
    the least that fits in memory."""
    interleave: int = 0
    """Pipeline chunks a stage is cut into; 0: as many as the layers and the micro-batches allow."""
    imbalance: float = 1.0
    """Load of the busiest experts' rank over the mean; 1 with forced balance or a capacity factor of 1."""
    exchange_overlap: float = 0.0
    """Share of the experts' exchange that a schedule lays beside another micro-batch's computing (Megatron-Core's
    overlap of expert communication with one forward, one backward); 0: none, as in the published rows."""
    causal_flops: bool = True
    """Count only the half of attention that a causal mask leaves in utilisation; see `ModelConfig.flops_per_token`."""

    def __post_init__(self) -> None:
        choices = {
            "precision": PRECISIONS,
            "dispatcher": DISPATCHERS,
            "mapping": MAPPINGS,
            "sharding": SHARDING,
            "recompute": (*RECOMPUTE, "auto"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"Job got {name}={getattr(self, name)!r}; give one of {', '.join(allowed)}")
        for name, least in (("global_batch", 1), ("micro_batch", 1), ("interleave", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Job got {name}={value!r}; give a whole number of at least {least}")
        if not isinstance(self.exchange_overlap, (int, float)) or not 0 <= self.exchange_overlap <= 1:
            raise ValueError(f"Job got exchange_overlap={self.exchange_overlap!r}; it is a share: give 0 to 1")
        if not isinstance(self.imbalance, (int, float)) or not 1 <= self.imbalance < float("inf"):
            raise ValueError(
                f"Job got imbalance={self.imbalance!r}; the busiest rank has at least the mean: give 1 or more"
            )

    def but(self, **changes: Any) -> Job:
        """The same job with other choices."""
        return replace(self, **changes)


def job_of(job: Job | None, choices: dict[str, Any]) -> Job:
    """A job with some of its fields replaced, or made from them."""
    known = [field.name for field in fields(Job)]
    unknown = sorted(set(choices) - set(known))
    if unknown:
        raise ValueError(f"a Job has no {', '.join(unknown)}; it has {', '.join(known)}")
    if job is None and "global_batch" not in choices:
        raise ValueError("no job is given; give global_batch=, the sequences of one step, or job=")
    return Job(**choices) if job is None else job.but(**choices)


def micro_batches(job: Job, folding: Folding) -> int:
    """How many micro-batches a rank computes in a step.

    >>> micro_batches(Job(global_batch=256), Folding(world=128, tp=2, pp=8))
    32
    """
    at_once = job.micro_batch * folding.dp
    if job.global_batch % at_once:
        raise ValueError(
            f"global_batch={job.global_batch} is no multiple of micro_batch x dp = {job.micro_batch} x {folding.dp}; "
            f"give a multiple of {at_once}, or another mapping"
        )
    return job.global_batch // at_once


def chunks(job: Job, folding: Folding, model: ModelConfig) -> int:
    """Pipeline chunks of a stage: what was asked for, checked, or the most that is legal."""
    if folding.pp > model.layers:
        raise ValueError(f"pp={folding.pp} is more than layers={model.layers}; give at most one stage a layer")
    if folding.pp == 1:
        legal = [1]
    else:
        whole = model.layers % folding.pp == 0 == micro_batches(job, folding) % folding.pp
        per_stage = model.layers // folding.pp
        legal = [v for v in range(1, per_stage + 1) if per_stage % v == 0] if whole else [1]
    if job.interleave and job.interleave not in legal:
        raise ValueError(
            f"interleave={job.interleave} does not fit layers={model.layers}, pp={folding.pp} and "
            f"{micro_batches(job, folding)} micro-batches (pp must divide both); give one of {legal}, or 0"
        )
    return job.interleave or legal[-1]

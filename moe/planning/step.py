"""One training step from its parts.

    step = m (stage + head) + (PP - 1) / v (stage + head / PP + hops) + optimizer + what data parallelism does not hide

m micro-batches, v chunks a stage (interleaved one-forward-one-backward, arXiv 2104.04473, section 2.2); the stage with the
output head is the slowest and sets the pace. Gradients are reduced while the last micro-batch's backward pass runs, weights
gathered while the first forward pass runs; only what is longer than those passes shows. Where parameters are sharded they
travel for every micro-batch.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property, partial

from moe.folding import Folding
from moe.planning.hardware import Hardware
from moe.planning.job import Job, chunks, job_of, micro_batches
from moe.planning.layers import EXCHANGE, ROW_BYTES, Layers, Parts
from moe.planning.memory import Memory, memory, rank_parameters, stage_layers
from moe.planning.model import ModelConfig
from moe.planning.model import model as by_name

ADAM_BYTES = 30
"""Read and written for one parameter by Adam: gradient, master weight, two moments, bf16 weight."""


SHARD_COPY_BYTES = 12
"""Read and written for one parameter and micro-batch where parameters are sharded: two gathers and one reduction, in bf16."""


@dataclass(frozen=True)
class Step:
    """The modelled step of a model under a folding; nothing here was measured."""

    model: ModelConfig
    """Its sizes."""
    folding: Folding
    """The mapping."""
    job: Job
    """The way of training."""
    hardware: Hardware
    """The machine."""
    recompute: str
    """What the backward pass computes again: "none", "moe", "full"."""
    again: int
    """In how many layers of each stage."""
    memory: Memory
    """Bytes of the fullest rank."""

    @cached_property
    def parts(self) -> dict[str, float]:
        """Seconds of the slowest rank by part; they sum to `seconds`."""
        layers = Layers(self.model, self.folding, self.job, self.hardware)
        return _seconds(layers, self.recompute, self.again)

    @cached_property
    def seconds(self) -> float:
        """Of one step."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has room."""
        return self.memory.total <= self.hardware.memory_bytes

    @property
    def tflops(self) -> float:
        """TFLOP/s of one rank, counted as `ModelConfig.flops_per_token` does."""
        tokens = self.job.global_batch * self.model.sequence
        flops = tokens * self.model.flops_per_token(causal=self.job.causal_flops)
        return flops / self.seconds / self.folding.world / 1e12

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: `tflops` over the peak of the job's precision."""
        return 1e12 * self.tflops / self.hardware.peak(self.job.precision)

    def table(self) -> str:
        """Seconds and shares by part, and memory, for people."""
        gib = 2**30
        lines = [
            f"modelled on {self.hardware.name}; {self.folding}; recomputation: {self.recompute}, {self.again} layers a stage"
        ]
        lines += [f"{'part':<26}{'seconds':>9}{'share':>8}"]
        for part, seconds in sorted(self.parts.items(), key=lambda item: -item[1]):
            lines.append(f"{part:<26}{seconds:>9.3f}{seconds / self.seconds:>8.1%}")
        lines.append(f"{'step':<26}{self.seconds:>9.3f}{1:>8.0%}")
        lines.append(f"{self.tflops:.1f} TFLOP/s a rank, MFU {self.mfu:.1%} ({self.job.precision} peak)")
        room = self.hardware.memory_bytes / gib
        held = ", ".join(f"{name} {value / gib:.1f}" for name, value in vars(self.memory).items())
        verdict = "fits" if self.fits else "DOES NOT FIT"
        lines.append(f"memory {self.memory.total / gib:.1f} of {room:.1f} GiB, {verdict}: {held}")
        return "\n".join(lines)


def plan(
    model: ModelConfig | str, folding: Folding, job: Job | None = None, hardware: Hardware | str = "h100", **choices
) -> Step:
    """Model one training step.

    Args:
        model: sizes, or a name of `moe.planner.MODELS`.
        folding: the mapping.
        job: the way of training; or its fields as keyword arguments, `global_batch` at least.
        hardware: the machine, or what `Hardware.load` takes.
        choices: fields of `Job`, over those of `job`.

    Returns a `Step`, also when it does not fit in memory: ask `.fits`.

    >>> step = plan("mixtral-8x22b", Folding(world=128, tp=2, pp=8, ep=8), global_batch=256)
    >>> step.fits, 0.4 < step.mfu < 0.6
    (True, True)
    """
    sizes = by_name(model) if isinstance(model, str) else model
    machine = Hardware.load(hardware) if isinstance(hardware, str) else hardware
    way = job_of(job, choices)
    folding.check_model(
        num_experts=sizes.num_experts,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        sequence=sizes.sequence,
        expert_ffn=sizes.expert_ffn,
    )
    layers = Layers(sizes, folding, way, machine)
    recompute, again = _least_recomputation(layers)
    return Step(sizes, folding, way, machine, recompute, again, memory(layers, recompute, again))


def _least_recomputation(layers: Layers) -> tuple[str, int]:
    """What, and in how many layers of each stage; everything if nothing fits."""
    count, wanted = stage_layers(layers), layers.job.recompute
    if wanted != "auto":
        return wanted, 0 if wanted == "none" else count
    if _spare(layers, "none", 0) >= 0:
        return "none", 0
    for recompute in ("moe", "full"):
        # memory falls with every further layer, so a bisection finds the first number that fits
        spare = partial(_spare, layers, recompute)
        again = 1 + bisect_left(range(1, count + 1), 0, key=spare)
        if again <= count:
            return recompute, again
    return "full", count


def _spare(layers: Layers, recompute: str, again: int) -> float:
    return layers.hardware.memory_bytes - memory(layers, recompute, again).total


def _seconds(layers: Layers, recompute: str, again: int) -> dict[str, float]:
    """Seconds by part."""
    m, f, job = layers.model, layers.folding, layers.job
    count, v = micro_batches(job, f), chunks(job, f, m)
    stage = Parts()
    for dense, layers_of_kind in ((False, m.moe_layers), (True, m.dense_layers)):
        if layers_of_kind:
            held = stage_layers(layers) * layers_of_kind / m.layers
            layer = layers.layer(dense=dense, recompute=recompute, share=again / stage_layers(layers))
            for part, times in layer.items():
                stage.put(part, *(held * t for t in times))
    head = layers.head()
    seconds = {part: count * sum(times) for part, times in (*stage.items(), *head.items())}
    seconds["pipeline bubble"] = (f.pp - 1) / v * (stage.total() + head.total() / f.pp) + _hops(layers)
    seconds["optimizer"] = _optimizer(layers)
    seconds["data parallel"] = _data_parallel(layers, stage, head)
    return seconds


def _hops(layers: Layers) -> float:
    """Activations handed on while the pipeline fills and drains; in between they hide behind other chunks."""
    f = layers.folding
    size = ROW_BYTES * layers.tokens * layers.model.hidden
    crosses = layers.span("pp").nodes > 1
    return 2 * (f.pp - 1) * layers.costs.exchange(0 if crosses else size, size if crosses else 0)


def _optimizer(layers: Layers) -> float:
    routed, other = rank_parameters(layers)
    f = layers.folding
    return layers.costs.memory(ADAM_BYTES * (routed / f.edp + other / (f.dp * f.cp)))


def _data_parallel(layers: Layers, stage: Parts, head: Parts) -> float:
    """What gathers of weights and reductions of gradients add to a step."""
    job, costs = layers.job, layers.costs
    sizes = tuple(zip(rank_parameters(layers), (layers.span("edp"), layers.span("cp-dp"))))
    gather = sum(costs.ring(2 * size, span) for size, span in sizes)
    forward, backward = (stage.total(side) + head.total(side) for side in (0, 1))
    if job.sharding == "optimizer":
        reduce = sum(costs.ring(4 * size, span) for size, span in sizes)
        return max(0.0, gather - forward) + max(0.0, reduce - backward)
    # FSDP copies gathered weights out of, and gradients into, its flat buffers
    copies = costs.memory(SHARD_COPY_BYTES * sum(rank_parameters(layers)))
    busy = sum(stage[EXCHANGE]) if layers.exchange_leaves_node else 0.0
    hidden = layers.hardware.sharded_overlap * (forward + backward - busy)
    return micro_batches(job, layers.folding) * (copies + max(0.0, 3 * gather - hidden))

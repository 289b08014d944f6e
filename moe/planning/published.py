"""Published step figures that the constants are fitted on: MoE Parallel Folding, arXiv 2504.14960, tables 1 to 3.

H100, 4,096 tokens, global batch 256, bf16 unless said, tokens dropped at a capacity factor of 1. The paper prints the mapping;
micro-batch 1 and the largest interleaving are assumed. Without folding ETP = TP and EP lies inside DP.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.folding import Folding
from moe.planning.hardware import Hardware
from moe.planning.job import Job
from moe.planning.step import Step, plan


@dataclass(frozen=True, kw_only=True)
class Row:
    """One published figure."""

    model: str
    """Name of the model."""
    method: str
    """As the paper calls it."""
    folding: Folding
    """The mapping."""
    mfu: float | None
    """Published share of the bf16 peak; None: out of memory."""
    job: Job = field(default_factory=lambda: Job(global_batch=256))
    """The way of training."""

    def step(self, hardware: Hardware) -> Step:
        """The modelled step."""
        return plan(self.model, self.folding, self.job, hardware)

    def modelled(self, hardware: Hardware) -> float:
        """Modelled share of the bf16 peak, also in FP8, so that both precisions compare."""
        return 1e12 * self.step(hardware).tflops / hardware.peak("bf16")


NESTED = Job(global_batch=256, mapping="nested")
FSDP = NESTED.but(sharding="parameters")
METHODS = {"FSDP": FSDP, "FSDP+EP": FSDP, "TP+EP+DP": NESTED, "MCore": NESTED, "MCore+folding": Job(global_batch=256)}


def _row(model: str, world: int, method: str, mfu: float | None, **sizes: int) -> Row:
    etp = 1 if method == "MCore+folding" else sizes.get("tp", 1)
    return Row(model=model, method=method, folding=Folding(world=world, etp=etp, **sizes), mfu=mfu, job=METHODS[method])


TABLE = (
    _row("mixtral-8x22b", 128, "FSDP", 0.043, tp=8),
    _row("mixtral-8x22b", 128, "FSDP+EP", 0.234, tp=2, ep=8),
    _row("mixtral-8x22b", 128, "TP+EP+DP", 0.366, tp=4, ep=8),
    _row("mixtral-8x22b", 128, "MCore", 0.463, tp=2, ep=4, pp=8),
    _row("mixtral-8x22b", 128, "MCore+folding", 0.493, tp=2, ep=8, pp=8),
    _row("llama3-8x70b", 256, "FSDP", None, tp=8, cp=8),
    _row("llama3-8x70b", 256, "FSDP+EP", 0.196, tp=8, ep=8),
    _row("llama3-8x70b", 256, "TP+EP+DP", None, tp=8, ep=8),
    _row("llama3-8x70b", 256, "MCore", 0.388, tp=8, ep=4, pp=8),
    _row("llama3-8x70b", 256, "MCore+folding", 0.416, tp=8, ep=8, pp=16),
    _row("qwen2-57b-a14b", 64, "FSDP", 0.099, tp=2),
    _row("qwen2-57b-a14b", 64, "FSDP+EP", 0.254, tp=1, ep=8),
    _row("qwen2-57b-a14b", 64, "TP+EP+DP", 0.231, tp=4, ep=4),
    _row("qwen2-57b-a14b", 64, "MCore", 0.353, tp=2, ep=4, pp=4),
    _row("qwen2-57b-a14b", 64, "MCore+folding", 0.390, tp=2, ep=4, pp=4),
    _row("mixtral-8x22b-g8t8", 128, "FSDP", 0.022, tp=8),
    _row("mixtral-8x22b-g8t8", 128, "FSDP+EP", 0.090, tp=4, ep=8),
    _row("mixtral-8x22b-g8t8", 128, "TP+EP+DP", 0.087, tp=8, ep=8),
    _row("mixtral-8x22b-g8t8", 128, "MCore", 0.171, tp=2, ep=8, pp=8),
    _row("mixtral-8x22b-g8t8", 128, "MCore+folding", 0.288, tp=4, ep=8, pp=8),
)
"""Tables 1 and 3."""

PEAK_TFLOPS = 989.5


def _fp8(method: str, tflops: float, ep: int) -> Row:
    etp = 1 if method == "MCore+folding" else 2
    folding = Folding(world=128, tp=2, pp=8, ep=ep, etp=etp)
    job = METHODS[method].but(precision="fp8")
    return Row(model="mixtral-8x22b", method=method, folding=folding, mfu=tflops / PEAK_TFLOPS, job=job)


FP8 = (_fp8("MCore", 575.1, 4), _fp8("MCore+folding", 631.7, 8))
"""Table 2, as shares of the bf16 peak; its bf16 rows are those of `TABLE`."""

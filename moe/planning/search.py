"""The fastest legal folding that fits in memory: every one of `Folding.enumerate` is modelled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe.folding import Folding
from moe.planning.hardware import Hardware
from moe.planning.job import Job, job_of
from moe.planning.model import ModelConfig
from moe.planning.model import model as by_name
from moe.planning.step import Step, plan


@dataclass(frozen=True)
class Search:
    """All legal foldings of a world, judged."""

    steps: tuple[Step, ...]
    """Those that fit in memory, fastest first."""
    too_big: tuple[Step, ...]
    """Those that do not, the smallest first."""
    refused: tuple[tuple[Folding, str], ...]
    """Those that the job cannot use, and why."""

    @property
    def best(self) -> Step:
        """The fastest that fits; ValueError where none does."""
        if self.steps:
            return self.steps[0]
        words = [f"no folding works: {len(self.too_big)} do not fit in memory, {len(self.refused)} suit not the job"]
        if self.too_big:
            least, gib = self.too_big[0], 2**30
            words.append(
                f"the smallest, {least.folding}, needs {least.memory.total / gib:.1f} of "
                f"{least.hardware.memory_bytes / gib:.1f} GiB: give more ranks or a shorter sequence"
            )
        if self.refused:
            words.append(f"first refusal: {self.refused[0][1]}")
        raise ValueError("; ".join(words))

    def table(self, count: int = 10) -> str:
        """The fastest ones, for people."""
        lines = [
            f"{len(self.steps)} foldings fit, {len(self.too_big)} do not, {len(self.refused)} suit not the job (modelled)",
            "  tp  cp  pp  ep etp  micro  seconds    MFU    GiB  recomputation",
        ]
        for s in self.steps[:count]:
            f = s.folding
            sizes = "".join(f"{size:>4}" for size in (f.tp, f.cp, f.pp, f.ep, f.etp))
            again = f"{s.recompute} ({s.again} layers a stage)" if s.again else "none"
            held = s.memory.total / 2**30
            lines.append(f"{sizes}{s.job.micro_batch:>7}{s.seconds:>9.3f}{s.mfu:>7.1%}{held:>7.1f}  {again}")
        return "\n".join(lines)


def search(
    model: ModelConfig | str,
    world: int,
    job: Job | None = None,
    hardware: Hardware | str = "h100",
    *,
    micro_batches: Iterable[int] = (1,),
    limits: dict[str, int | Iterable[int]] | None = None,
    **choices,
) -> Search:
    """Model every legal folding of a world.

    Args:
        model, job, hardware, choices: as in `plan`.
        world: how many ranks.
        micro_batches: sizes to try with every folding.
        limits: of `Folding.enumerate`: the sizes allowed for tp, cp, pp, ep, etp.

    >>> found = search("mixtral-8x7b", 16, global_batch=64, limits={"cp": 1, "etp": 1})
    >>> found.best.fits, found.best.seconds <= min(s.seconds for s in found.steps)
    (True, True)
    """
    sizes = by_name(model) if isinstance(model, str) else model
    machine = Hardware.load(hardware) if isinstance(hardware, str) else hardware
    way = job_of(job, choices)
    tried = [way.but(micro_batch=size) for size in micro_batches]
    if isinstance(world, bool) or not isinstance(world, int) or world < 1:
        raise ValueError(f"world is {world!r}; give a whole number of ranks, at least 1")
    steps, refused = [], []
    rules = {name: getattr(sizes, name) for name in ("num_experts", "heads", "kv_heads", "layers", "sequence")}
    for folding in Folding.enumerate(world=world, expert_ffn=sizes.expert_ffn, **rules, **(limits or {})):
        for one in tried:
            try:
                steps.append(plan(sizes, folding, one, machine))
            except ValueError as why:
                refused.append((folding, str(why)))
    fitting = sorted((s for s in steps if s.fits), key=lambda s: s.seconds)
    rest = sorted((s for s in steps if not s.fits), key=lambda s: s.memory.total)
    return Search(tuple(fitting), tuple(rest), tuple(refused))

"""The sections that say which model runs and how attention and experts are spread over the ranks; see `launch.config`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from launch.section import Section, option

SCHEDULES = (
    *("auto", "ring", "biring", "tokenring", "gather"),
    *("mesh:AxB", "ulysses", "usp:UxR", "hybrid:OUTER/INNER@SIZE"),
)
LAYOUTS = ("zigzag", "contiguous")
DTYPES = ("float32", "bfloat16", "float16")
DISPATCHERS = ("auto", "dedup", "hierarchical", "alltoall", "allgather")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The model that watches and writes."""

    section: ClassVar[str] = "model"

    source: str = option("--model", "demo")
    """Directory of a Hugging Face vision-language model, `demo` (needs no download), or `demo-moe`: the demo with experts."""
    dtype: str = option("--dtype", "float32")
    """Type of weights and activations: float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        self.check_types()
        if not self.source:
            raise self.refuse("source", "give a model directory, or `demo`")
        self.one_of("dtype", DTYPES)


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Section):
    """How the sequence is spread over the ranks and attended to."""

    section: ClassVar[str] = "attention"

    kind: str = option("--attention", "exact")
    """Only `exact` (dense attention) so far."""
    schedule: str = option("--schedule", "auto")
    """How keys, values and queries travel: auto, ring, biring, tokenring, gather, mesh:AxB, ulysses, usp:UxR or
    hybrid:OUTER/INNER@SIZE; the numbers must multiply to the ranks."""
    layout: str = option("--layout", "zigzag")
    """Which rows each rank holds: zigzag (balanced under a causal mask) or contiguous."""

    def __post_init__(self) -> None:
        self.check_types()
        if self.kind == "anchor":
            raise self.refuse("kind", "sparse prefill across ranks is not built yet; use exact")
        self.one_of("kind", ("exact",))
        if self.schedule.partition(":")[0] not in {name.partition(":")[0] for name in SCHEDULES}:
            raise self.refuse("schedule", f"it must be one of {', '.join(SCHEDULES)}")
        self.one_of("layout", LAYOUTS)


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Section):
    """How the experts of a mixture-of-experts model are spread over the ranks."""

    section: ClassVar[str] = "moe"

    experts: int = option("--experts", 8)
    """Experts that each feed-forward network of demo-moe becomes: copies of it, behind a random router."""
    topk: int = option("--moe-topk", 2)
    """Experts that each token goes to."""
    ep: int | None = option("--ep", None)
    """Ranks that the experts of a layer are spread over; left out: as many as experts and ranks allow."""
    etp: int = option("--etp", 1)
    """Ranks that each expert is cut over; ep x etp must divide the ranks."""
    dispatcher: str = option("--dispatcher", "auto")
    """How tokens travel to their experts: auto, dedup, hierarchical, alltoall or allgather."""
    ranks_per_node: int | None = option(None, None)
    """Ranks of one node, for hierarchical and auto; left out: those of each machine."""
    chunks: int = option(None, 1)
    """Parts that a rank's tokens go in, one travelling while the experts work on another."""

    def __post_init__(self) -> None:
        self.check_types()
        for name in ("experts", "ep", "etp", "ranks_per_node", "chunks"):
            self.within(name, 1)
        self.within("topk", 1, self.experts)
        self.one_of("dispatcher", DISPATCHERS)
        if self.ranks_per_node is not None and self.dispatcher not in ("hierarchical", "auto"):
            raise self.refuse("ranks_per_node", f"{self.dispatcher} sends the same on any nodes; leave it out")

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the settings that are not at their default."""
        return tuple(s.name for s in fields(self) if getattr(self, s.name) != s.default)

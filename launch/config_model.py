"""The sections that say which model runs and how attention and experts are spread over the ranks; see `launch.config`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from launch.section import Section, option

SCHEDULES = (
    *("auto", "ring", "biring", "tokenring", "gather"),
    *("mesh:AxB", "ulysses", "usp:UxR", "hybrid:OUTER/INNER@SIZE"),
)
LAYOUTS = ("zigzag", "contiguous")
KINDS = ("exact", "anchor")
IDENTIFY = ("rescore", "pooled", "lse", "every")
KEEP = ("none", "visual", "text")
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
    """exact (dense attention), or anchor: the prompt is attended to sparsely (AnchorAttention), written tokens exactly."""
    schedule: str = option("--schedule", "auto")
    """How keys, values and queries travel: auto, ring, biring, tokenring, gather, mesh:AxB, ulysses, usp:UxR or
    hybrid:OUTER/INNER@SIZE; the numbers must multiply to the ranks. With anchor auto only: its exchanges are its own."""
    layout: str = option("--layout", "zigzag")
    """Which rows each rank holds: zigzag (balanced under a causal mask; with anchor its chunks end where groups of rows
    end) or contiguous."""

    def __post_init__(self) -> None:
        self.check_types()
        self.one_of("kind", KINDS)
        if self.kind == "anchor" and self.schedule != "auto":
            raise self.refuse(
                "schedule", "with --attention anchor only wanted rows travel, in exchanges of its own; leave it out"
            )
        if self.schedule.partition(":")[0] not in {name.partition(":")[0] for name in SCHEDULES}:
            raise self.refuse("schedule", f"it must be one of {', '.join(SCHEDULES)}")
        self.one_of("layout", LAYOUTS)


@dataclass(frozen=True, kw_only=True)
class AnchorSection(Section):
    """What `--attention anchor` computes; see `sparse_attn.AnchorConfig`."""

    section: ClassVar[str] = "anchor"

    theta: float = option("--anchor-theta", 6.0)
    """A column of keys is kept where anchor - score <= theta for a row that counts; larger keeps more, inf all (dense)."""
    density: float | None = option("--anchor-density", None)
    """Instead of theta: the share of causal pairs to compute, from which each layer's theta is estimated."""
    tuned: str | None = option("--anchor-tuned", None)
    """Instead of theta: JSON file of `sparse_attn.tune` with thetas for each layer and head."""
    identify: str = option("--anchor-identify", "rescore")
    """How columns are found: rescore, pooled (the paper's), lse or every (reference, slow)."""
    keep: str = option("--anchor-keep", "none")
    """Rows that every later row sees whatever its stripes: none, visual (what the reduction kept) or text."""
    dense: str = option("--anchor-dense", "auto")
    """auto: plain attention where stripes would not pay; never: stripes at any length."""
    block: int | None = option(None, None)
    """Rows that pooled and lse average; keys of initial block and window. Left out: by length."""
    step: int | None = option(None, None)
    """Blocks in a group, whose rows share columns. Left out: by length."""
    share: str = option(None, "query")
    """query: every query head has columns of its own; key: the query heads of a key head share theirs."""
    last: int = option(None, 64)
    """rescore: so many last rows of the prompt are asked about every column."""

    def __post_init__(self) -> None:
        self.check_types()
        if math.isnan(self.theta):
            raise self.refuse("theta", "give a number; inf keeps every column")
        self.within("density", 0, 1, open_low=True)
        self.one_of("identify", IDENTIFY)
        self.one_of("keep", KEEP)
        self.one_of("dense", ("auto", "never"))
        self.one_of("share", ("query", "key"))
        for name in ("block", "step"):
            self.within(name, 1)
        self.within("last", 0)
        if self.tuned == "":
            raise self.refuse("tuned", "give the name of a file that TunedConfig.save wrote")
        if self.density is not None and "theta" in self.given:
            raise self.refuse("theta", "anchor.density asks for a theta of its own; give one of them")
        if self.tuned is not None and (told := [name for name in self.given if name not in ("tuned", "keep")]):
            raise self.refuse(told[0], f"{self.tuned} says this itself; leave it out")


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Section):
    """How the experts of a mixture-of-experts model are spread over the ranks."""

    section: ClassVar[str] = "moe"

    experts: int = option("--experts", 8)
    """Experts that each feed-forward network of demo-moe becomes: copies of it, behind a random router (other models have
    their own number)."""
    topk: int = option("--moe-topk", 2)
    """Experts that each token of demo-moe goes to."""
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

"""Every setting of a run: one frozen dataclass a section, one source for command line, file and Python.

The text under a field is its help on the command line; `flag` in its metadata is its short way in. Each value is checked
where it is made, so a `RunConfig` that exists is one whose values are legal by themselves (whether the files exist and the
parts fit together is `launch.preflight`). The model and how it is spread over the ranks: `launch.config_model`.

    >>> config = RunConfig(video=VideoConfig(paths=("a.mp4",)), engine=EngineConfig(nproc=4))
    >>> config.reduce.spec, from_json(to_json(config)) == config
    ('divprune:0.1', True)
"""

from __future__ import annotations

import json
from dataclasses import Field, asdict, dataclass, field, fields
from typing import ClassVar

from launch.config_model import AnchorSection, AttentionConfig, ModelConfig, MoEConfig
from launch.errors import ConfigError
from launch.section import Section, option

ENGINES = ("torchrun", "ray", "mpi")
DEVICES = ("auto", "cpu", "cuda")
RAY_STRATEGIES = ("PACK", "SPREAD")


@dataclass(frozen=True, kw_only=True)
class VideoConfig(Section):
    """Which frames of which files."""

    section: ClassVar[str] = "video"

    paths: tuple[str, ...] = option("VIDEO", ())
    """Video files; several are joined in the order given."""
    fps: float | None = option("--fps", None)
    """Frames to take for each second of video (not with --frames; with neither, every frame is taken)."""
    frames: int | None = option("--frames", None)
    """How many frames to take, spread evenly (not with --fps)."""
    start: float = option("--start", 0.0)
    """First second of the joined video to look at."""
    stop: float | None = option("--stop", None)
    """Second at which to stop; left out: the end."""
    loop: int = option("--loop", 1)
    """Play the list of files this many times in a row."""

    def __post_init__(self) -> None:
        self.check_types()
        if not self.paths:
            raise ConfigError("no video given: name at least one file, as in `tokenring run clip.mp4`")
        if any(not path for path in self.paths):
            raise self.refuse("paths", "every entry must be the name of a file")
        if self.fps is not None and self.frames is not None:
            raise ConfigError(f"both video.fps={self.fps:g} and video.frames={self.frames} given: choose one of them")
        self.within("fps", 0, open_low=True)
        self.within("frames", 1)
        self.within("start", 0)
        self.within("stop", self.start, open_low=True)
        self.within("loop", 1)


@dataclass(frozen=True, kw_only=True)
class ReduceConfig(Section):
    """How visual tokens become fewer."""

    section: ClassVar[str] = "reduce"

    spec: str = option("--reduce", "divprune:0.1")
    """METHOD:BUDGET, or METHOD,option=value:BUDGET. A budget with a dot or % is the share to keep, a whole number counts tokens
    of the whole video."""
    window: int = option("--window", 16)
    """Frames that are reduced together; more gives the method a wider view and needs more memory."""

    def __post_init__(self) -> None:
        self.check_types()
        if not self.spec:
            raise self.refuse("spec", "give METHOD:BUDGET such as divprune:0.1, or identity to keep every token")
        self.within("window", 1)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Section):
    """What is asked and how the answer is drawn."""

    section: ClassVar[str] = "generate"

    prompt: str = option("--prompt", "Describe the video.")
    """The question about the video."""
    max_new_tokens: int = option("--max-new-tokens", 32)
    """Most tokens to write; the model may end earlier."""
    temperature: float = option("--temperature", 0.0)
    """0 takes the likeliest token each time; above 0 draws, flatter as it grows."""
    top_k: int | None = option("--top-k", None)
    """Draw from the k likeliest tokens only (needs --temperature above 0)."""
    top_p: float | None = option("--top-p", None)
    """Draw from the smallest set that holds this share of the probability (needs --temperature above 0)."""
    seed: int = option("--seed", 0)
    """Seed of everything drawn: sampled tokens, random reducers."""

    def __post_init__(self) -> None:
        self.check_types()
        self.within("max_new_tokens", 1)
        self.within("temperature", 0)
        self.within("top_k", 1)
        self.within("top_p", 0, 1, open_low=True)
        self.within("seed", 0, 2**63 - 1)
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and self.temperature == 0:
                raise self.refuse(name, "it has no effect at temperature 0; give --temperature above 0 or leave it out")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Section):
    """Who starts the ranks and within which limits."""

    section: ClassVar[str] = "engine"

    name: str = option("--engine", "torchrun")
    """torchrun, ray or mpi."""
    nproc: int = option("--nproc", 1)
    """Number of ranks. Leave it out under torchrun, mpirun or srun: those decide it, and torchrun takes it for its own."""
    device: str = option("--device", "auto")
    """cpu, cuda, or auto: cuda where there is one for every rank."""
    threads: int | None = option("--threads", None)
    """CPU threads of each rank; left out: cores divided by the ranks on the machine."""
    topology: str | None = option("--topology", None)
    """The links between the ranks, by which auto schedules and dispatchers choose: probe (measured once the model is loaded,
    some seconds) or a file of Topology.save; left out: bytes decide."""
    timeout_seconds: float | None = option("--timeout", None)
    """Seconds after which the whole run is stopped with exit code 124; left out: no limit."""
    exchange_timeout_seconds: float = option(None, 600.0)
    """Seconds a rank waits for another one in a single exchange (with --verify also for rank 0 to finish comparing)."""
    ray_address: str | None = option("--ray-address", None)
    """Ray cluster to join (host:port or auto); left out: a cluster of this machine, started for the run."""
    ray_strategy: str = option(None, "PACK")
    """PACK puts ranks on few nodes, SPREAD on many."""
    ray_wait_seconds: float = option(None, 60.0)
    """Seconds to wait for the cluster to find room for every rank."""

    def __post_init__(self) -> None:
        self.check_types()
        self.one_of("name", ENGINES)
        self.one_of("device", DEVICES)
        self.one_of("ray_strategy", RAY_STRATEGIES)
        self.within("nproc", 1)
        self.within("threads", 1)
        if self.topology == "":
            raise self.refuse("topology", "give probe, or the name of a file of Topology.save")
        for name in ("timeout_seconds", "exchange_timeout_seconds", "ray_wait_seconds"):
            self.within(name, 0, open_low=True)
        if self.name != "ray":
            for setting in fields(self):
                if setting.name.startswith("ray_") and getattr(self, setting.name) != setting.default:
                    raise self.refuse(setting.name, f"it belongs to --engine ray, not to {self.name}")


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Section):
    """What is kept and shown."""

    section: ClassVar[str] = "output"

    out: str | None = option("--out", None)
    """Folder for report.json, report.txt, pictures, records and logs; it appears whole or not at all."""
    overwrite: bool = option("--overwrite", False)
    """Replace an earlier run in --out."""
    json: bool = option("--json", False)
    """Print one JSON object on standard output and nothing else there."""
    quiet: bool = option("--quiet", False)
    """No progress on standard error; with --json no report there either."""
    verify: bool = option("--verify", False)
    """Run the same input on one rank and compare, with plain attention or, sparse, over the same pairs (and say how far from
    dense that is); exit code 1 above the tolerance."""
    tolerance: float = option(None, 2e-4)
    """Largest difference of logits that --verify accepts."""

    def __post_init__(self) -> None:
        self.check_types()
        if self.out == "":
            raise self.refuse("out", "give the name of a folder")
        if self.overwrite and self.out is None:
            raise self.refuse("overwrite", "there is nothing to overwrite without --out")
        self.within("tolerance", 0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of `tokenring run`."""

    video: VideoConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    reduce: ReduceConfig = field(default_factory=ReduceConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    anchor: AnchorSection = field(default_factory=AnchorSection)
    moe: MoEConfig = field(default_factory=MoEConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


SECTIONS: dict[str, type[Section]] = {
    cls.section: cls
    for cls in (
        *(VideoConfig, ModelConfig, ReduceConfig, AttentionConfig, AnchorSection, MoEConfig),
        *(GenerateConfig, EngineConfig, OutputConfig),
    )
}


def settings() -> dict[str, Field]:
    """Every legal dotted name with its field: `{"video.paths": Field, ...}` in declared order."""
    return {f"{name}.{f.name}": f for name, cls in SECTIONS.items() for f in fields(cls)}


def to_json(config: RunConfig) -> str:
    """The configuration as JSON text, to hand to ranks and to keep beside a result."""
    return json.dumps(asdict(config), indent=2)


def from_json(text: str) -> RunConfig:
    """The inverse of `to_json`. Raises ConfigError for what a section refuses."""
    parts = {name: dict(values) for name, values in json.loads(text).items()}
    parts["video"]["paths"] = tuple(parts["video"]["paths"])
    return RunConfig(**{name: SECTIONS[name](**values) for name, values in parts.items()})

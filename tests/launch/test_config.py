"""Settings: one source for file, flags and Python; every mistake is one line that names what is allowed."""

import dataclasses

import pytest

from launch import settings
from launch.config import (
    SECTIONS,
    AttentionConfig,
    EngineConfig,
    GenerateConfig,
    OutputConfig,
    RunConfig,
    VideoConfig,
    from_json,
    to_json,
)
from launch.errors import ConfigError

VIDEO = {"video.paths": ("clip.mp4",)}


def resolve(*sets, file=None, **flags):
    return settings.resolve(
        file=file, flags={**VIDEO, **{k.replace("__", "."): v for k, v in flags.items()}}, sets=sets
    )


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_later_layers_win_and_each_value_remembers_its_layer(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("engine: {nproc: 2, name: mpi}\ngenerate: {seed: 5}\nvideo: {fps: 2}\n")
    resolved = resolve("engine.nproc=4", file=file, engine__nproc=3, generate__seed=6)
    assert (resolved.config.engine.nproc, resolved.config.engine.name) == (4, "mpi")
    assert (resolved.config.generate.seed, resolved.config.video.fps) == (6, 2.0)
    names = ("engine.nproc", "engine.name", "generate.seed", "model.dtype", "video.paths")
    assert [resolved.origin[name] for name in names] == ["--set", f"file {file}", "--seed", "default", "VIDEO"]
    assert resolved.table()["engine.nproc"] == {"value": 4, "from": "--set"}
    assert set(resolved.table()) == set(settings.settings())


def test_a_flag_that_was_not_given_does_not_hide_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("generate: {seed: 5}")
    assert resolve(file=file, generate__seed=None).config.generate.seed == 5


def test_json_round_trip_keeps_every_value():
    config = RunConfig(
        video=VideoConfig(paths=("a.mp4", "b.mp4"), fps=1.5, stop=3.0),
        engine=EngineConfig(name="ray", nproc=3, ray_address="auto", timeout_seconds=5.0),
        generate=GenerateConfig(prompt="why?\n…", temperature=0.5, top_p=0.9),
        output=OutputConfig(out="x", verify=True),
    )
    assert from_json(to_json(config)) == config


def test_every_field_has_a_help_text_and_one_default_that_is_legal():
    assert set(settings.help_texts()) == set(settings.settings())
    assert all(text.strip() for text in settings.help_texts().values())
    config = RunConfig(video=VideoConfig(paths=("a",)))
    for name, cls in SECTIONS.items():
        assert isinstance(getattr(config, name), cls)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.engine.nproc = 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("output.tolerance=1e-5", 1e-5),
        ("generate.prompt=12", "12"),
        ("generate.prompt=a: b=c", "a: b=c"),
        ("video.fps=3", 3.0),
        ("video.fps=null", None),
        ("output.verify=true", True),
        ("video.paths=[x.mp4, y.mp4]", ("x.mp4", "y.mp4")),
        ("video.paths=x.mp4", ("x.mp4",)),
        ("engine.ray_wait_seconds=60", 60.0),
    ],
)
def test_set_reads_a_value_in_the_type_of_its_field(text, expected):
    section, name = text.partition("=")[0].split(".")
    value = getattr(getattr(resolve(text).config, section), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("engine.nprocs=4", ["engine.nprocs", "engine.nproc"]),
        ("nproc=4", ["engine.nproc"]),
        ("seed=1", ["generate.seed"]),
        ("generate.temprature=1", ["generate.temperature"]),
        ("zzz=1", ["video", "model", "reduce"]),
        ("engine.nproc", ["section.name=value"]),
        ("engine.nproc=two", ["engine.nproc", "whole number"]),
        ("engine.nproc=2.5", ["engine.nproc", "whole number"]),
        ("engine.nproc=true", ["engine.nproc", "whole number"]),
        ("engine.nproc=0", ["engine.nproc is 0", "1 or more"]),
        ("video.fps=[1", ["video.fps", "YAML"]),
        ("video.fps=.inf", ["video.fps", "above 0"]),
        ("video.fps=-1", ["video.fps", "above 0"]),
        ("video.frames=0", ["video.frames", "1 or more"]),
        ("video.stop=0", ["video.stop", "above 0"]),
        ("video.loop=0", ["video.loop"]),
        ("model.dtype=int8", ["float32", "bfloat16", "float16"]),
        ("reduce.window=0", ["reduce.window"]),
        ("attention.kind=sparse", ["sparse", "exact, anchor"]),
        ("anchor.theta=.nan", ["anchor.theta", "keeps every column"]),
        ("anchor.density=1.5", ["anchor.density", "at most 1"]),
        ("anchor.identify=all", ["rescore, pooled, lse, every"]),
        ("attention.kind=flash", ["exact"]),
        ("attention.schedule=rings", ["auto, ring, biring, tokenring, gather, mesh:AxB"]),
        ("attention.layout=striped", ["zigzag, contiguous"]),
        ("generate.max_new_tokens=0", ["generate.max_new_tokens"]),
        ("generate.temperature=-1", ["generate.temperature"]),
        ("generate.top_k=5", ["generate.top_k", "temperature"]),
        ("generate.top_p=0.5", ["generate.top_p", "temperature"]),
        ("engine.name=slurm", ["torchrun, ray, mpi"]),
        ("engine.ray_address=auto", ["engine.ray_address", "--engine ray"]),
        ("engine.ray_strategy=STRICT", ["PACK, SPREAD"]),
        ("engine.timeout_seconds=0", ["engine.timeout_seconds"]),
        ("output.overwrite=true", ["--out"]),
        ("output.tolerance=0", ["output.tolerance"]),
    ],
)
def test_a_wrong_set_is_refused_in_one_line_with_what_is_allowed(text, words):
    with pytest.raises(ConfigError) as caught:
        resolve(text)
    for word in words:
        assert word in one_line(caught)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("video: {fsp: 2}", ["video.fsp", "video.fps"]),
        ("vidoe: {fps: 2}", ["vidoe", "video"]),
        ("video: 2", ["video", "name: value"]),
        ("- 1", ["sections"]),
        ("video: {fps: [", ["YAML"]),
        ("generate: {prompt: 5}", ["generate.prompt", "text", "quote"]),
        ("engine: {nproc: '4'}", ["engine.nproc", "whole number"]),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, content, words):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        resolve(file=file)
    for word in ["bad.yaml", *words]:
        assert word in one_line(caught)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError) as caught:
        resolve(file=tmp_path / "none.yaml")
    assert "none.yaml" in one_line(caught)


def test_frame_rate_and_count_exclude_each_other():
    with pytest.raises(ConfigError) as caught:
        resolve(video__fps=2.0, video__frames=4)
    assert "choose one" in one_line(caught)


def test_python_callers_get_the_same_checks():
    with pytest.raises(ConfigError, match=r"engine.nproc is '4'.*whole number"):
        EngineConfig(nproc="4")
    with pytest.raises(ConfigError, match="no video"):
        VideoConfig()
    with pytest.raises(ConfigError, match="list of names"):
        VideoConfig(paths="clip.mp4")


def test_a_schedule_that_does_not_fit_the_ranks_is_refused_before_they_start() -> None:
    from launch.preflight import preflight

    config = RunConfig(
        video=VideoConfig(paths=("clip:bigbuckbunny",), frames=4),
        attention=AttentionConfig(schedule="mesh:2x3"),
        engine=EngineConfig(nproc=4),
    )
    with pytest.raises(ValueError, match="'mesh:2x3' is for 6 ranks, there are 4"):
        preflight(config)

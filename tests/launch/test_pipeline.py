"""The way of the data, whole: any number of ranks writes what one rank writes, and each family agrees with itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import pipeline
from launch.config import (
    ModelConfig,
    ReduceConfig,
    RunConfig,
    VideoConfig,
)
from launch.errors import ConfigError
from launch.models.base import VisualPlan
from launch.models.demo import DemoAdapter
from launch.preflight import method_of, planned_frames, preflight
from launch.progress import Log
from launch.records import RankRecord, merge, verified
from launch.report import as_text
from launch.watch import Windows, jobs
from tests.launch import runs, tiny_models
from tests.launch.drift import make_clip
from tests.pool import Pool
from token_reduction import Budget, build, methods

FAMILIES = list(tiny_models.MAKERS)


config_of = partial(runs.config_of, reduce__spec="divprune:0.5", reduce__window=8, generate__max_new_tokens=5)


def run_rank(group: Any, config: RunConfig) -> RankRecord:
    torch.set_num_threads(1)
    return pipeline.run(config, group, Log())


@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_ranks_writes_what_one_rank_writes(
    pool: Pool, clip: Path, models: dict[str, str], family: str
) -> None:
    alone = run_rank(None, config_of(clip, models[family], 1))
    assert alone.verify is not None and alone.verify["same_tokens"]
    for world, schedule in ((2, "tokenring"), (3, "ring"), (5, "gather"), (4, "biring")):
        records = pool.run(world, run_rank, config_of(clip, models[family], world, attention__schedule=schedule))
        first = records[0]
        assert first.generated_ids == alone.generated_ids and first.text == alone.text
        assert (first.tokens_before, first.tokens_after) == (alone.tokens_before, alone.tokens_after)
        assert first.verify is not None and first.verify["same_tokens"]
        assert first.verify["written_within_tolerance"] and first.verify["all_within_tolerance"]
        assert first.schedule == schedule
        assert sum(r.tokens_local for r in records) == alone.tokens_local
        assert {r.tokens_after for r in records} == {alone.tokens_after}
        cells = sorted((k["frame"], tuple(k["cells"])) for r in records for k in r.kept)
        assert cells == sorted((k["frame"], tuple(k["cells"])) for k in alone.kept)


def run_demo_rank(group: Any, config: RunConfig) -> RankRecord:
    """With tiny weights for the demo, whose encoder gives channels."""
    DemoAdapter.load = classmethod(tiny_models.demo)
    return run_rank(group, config)


@pytest.mark.parametrize("method", methods())
def test_every_reducer_keeps_the_same_tokens_on_any_number_of_ranks(
    pool: Pool, clip: Path, models: dict[str, str], method: str
) -> None:
    plain = not build(method).needs - {"text"}
    spec = {"identity": method, "cdpruner": "cdpruner,relevance=false:0.3"}.get(method, f"{method}:0.3")
    options = {"reduce__spec": spec, "reduce__window": 16 if plain else 3, "output__verify": False}
    source = models["llava"]
    if not plain:
        options["video__frames"], source = 4, "demo"
    (alone,) = pool.run(1, run_demo_rank, config_of(clip, source, 1, **options))
    records = pool.run(3, run_demo_rank, config_of(clip, source, 3, **options))
    assert records[0].generated_ids == alone.generated_ids
    assert records[0].tokens_after == alone.tokens_after
    assert (alone.tokens_after == alone.tokens_before) == (method == "identity")


@pytest.mark.parametrize(("family", "method"), [("llava", "visionzip"), ("qwen3", "difffp"), ("demo", "cdpruner")])
def test_a_reducer_that_looks_at_what_the_model_does_not_give_is_refused_before_ranks_start(
    clip: Path, models: dict[str, str], family: str, method: str
) -> None:
    missing = ", ".join(sorted(build(method).needs - DemoAdapter.channels if family == "demo" else build(method).needs))
    config = config_of(clip, models.get(family, family), 1, reduce__spec=f"{method}:0.3")
    with pytest.raises(ConfigError, match=f"reducer {method} needs {missing}, which model .* choose another"):
        preflight(config)
    with pytest.raises(ConfigError, match=r"looks at the question and generate\.prompt is empty"):
        run_rank(None, config_of(clip, models["llava"], 1, reduce__spec="catp:0.3", generate__prompt=""))


def test_windows_do_not_depend_on_ranks_and_ranks_cover_every_frame_once() -> None:
    for frames, window, group_size, world in ((21, 8, 1, 2), (21, 8, 1, 5), (9, 4, 2, 3), (1, 16, 2, 4), (64, 4, 1, 3)):
        grid = (-(-frames // group_size), 2, 2)
        plan = VisualPlan(frames=frames, frames_per_group=group_size, height=1, width=1, grid=grid)
        cut = Windows.cut(plan, window, build("uniform"), Budget.ratio(0.5))
        assert [f for first, last in cut.frames for f in range(first, last)] == list(range(frames))
        assert all(first % group_size == 0 for first, _ in cut.frames)
        seen = [f for rank in range(world) for j in jobs(cut, group_size, rank, world) for f in range(j.first, j.last)]
        assert sorted(seen) == list(range(frames))
        shared = {j.shared for rank in range(world) for j in jobs(cut, group_size, rank, world)}
        assert shared <= {len(cut.frames) < world}


def test_a_count_is_for_the_whole_video_and_is_kept_exactly(clip: Path, models: dict[str, str]) -> None:
    record = run_rank(None, config_of(clip, models["llava"], 1, reduce__spec="divprune:17", output__verify=False))
    assert record.tokens_after == 17


def test_sampling_draws_the_same_tokens_on_any_number_of_ranks(pool: Pool, clip: Path, models: dict[str, str]) -> None:
    options = {"generate__temperature": 0.8, "generate__top_k": 20, "generate__top_p": 0.9, "generate__seed": 4}
    alone = run_rank(None, config_of(clip, models["llava"], 1, **options))
    records = pool.run(2, run_rank, config_of(clip, models["llava"], 2, **options))
    assert {tuple(r.generated_ids) for r in records} == {tuple(alone.generated_ids)}
    assert records[0].verify is not None and records[0].verify["same_tokens"]


def test_the_cache_is_shared_out_evenly(pool: Pool, clip: Path, models: dict[str, str]) -> None:
    options = {"reduce__spec": "identity", "output__verify": False, "video__loop": 6}
    alone = run_rank(None, config_of(clip, models["qwen25"], 1, **options))
    records = pool.run(3, run_rank, config_of(clip, models["qwen25"], 3, **options))
    whole = alone.cache_bytes
    assert all(r.cache_bytes <= 1.05 * whole / 3 for r in records), ([r.cache_bytes for r in records], whole)


def test_positions_above_the_trained_context_are_a_warning(clip: Path, models: dict[str, str], tmp_path: Path) -> None:
    folder = shutil.copytree(models["llava"], tmp_path / "model")
    known = json.loads((folder / "config.json").read_text())
    known["text_config"]["max_position_embeddings"] = 190
    (folder / "config.json").write_text(json.dumps(known))
    short = run_rank(None, config_of(clip, str(folder), 1, video__frames=2, output__verify=False))
    assert short.warnings == []
    long = run_rank(None, config_of(clip, str(folder), 1, reduce__spec="uniform:0.05", output__verify=False))
    assert len(long.warnings) == 1 and "trained for" in long.warnings[0]


def test_clips_of_different_sizes_are_joined_and_it_is_said(
    pool: Pool, clip: Path, models: dict[str, str], tmp_path: Path
) -> None:
    other = make_clip(tmp_path / "other.mp4", 5, height=48, width=96)
    config = config_of(clip, models["qwen25"], 2)
    record = pool.run(2, run_rank, replace(config, video=VideoConfig(paths=(str(clip), str(other)))))[0]
    assert record.frames == 26 and record.verify is not None and record.verify["same_tokens"]
    assert any("resized to 64x40" in warning and "other.mp4 96x48" in warning for warning in record.warnings)


def test_half_precision_is_verified_against_its_own_noise(pool: Pool, clip: Path, models: dict[str, str]) -> None:
    config = config_of(clip, models["llava"], 2)
    half = replace(config, model=ModelConfig(source=models["llava"], dtype="bfloat16"))
    record = pool.run(2, run_rank, half)[0]
    assert record.verify is not None and record.verify["tolerance"] >= 2e-4
    assert record.verify["written_within_tolerance"] and record.verify["all_within_tolerance"]


def test_a_verification_above_its_tolerance_does_not_hold(pool: Pool, clip: Path, models: dict[str, str]) -> None:
    records = pool.run(2, run_rank, config_of(clip, models["llava"], 2, output__tolerance=1e-30))
    ranked = [replace(record, rank=rank, world=2) for rank, record in enumerate(records)]
    report = merge(ranked, engine="torchrun", config={})
    assert not verified(report)
    assert "tolerance 1.00e-30): does not hold" in as_text(report).lower()


def test_more_ranks_than_tokens_is_refused_on_every_rank(pool: Pool, clip: Path, models: dict[str, str]) -> None:
    record = pool.run(1, run_rank, config_of(clip, models["llava"], 1, video__frames=1, reduce__spec="uniform:1"))[0]
    assert record.tokens_after == 1
    with pytest.raises(ConfigError, match=r"engine.nproc is 500, more ranks than the \d+ tokens of the sequence"):
        preflight(config_of(clip, "demo", 500, video__frames=1, reduce__spec="uniform:1"))


def test_preflight_counts_tokens_of_the_demo_without_a_model(clip: Path) -> None:
    found = preflight(config_of(clip, "demo", 2, reduce__spec="divprune:0.1", reduce__window=10))
    assert (found.frames, found.tokens_before) == (21, 21 * 256)
    assert found.tokens_after == 256 + 256 + round(0.1 * 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduce__spec": "prune:0.1"}, "unknown reduction method 'prune'"),
        ({"reduce__spec": "divprune"}, "divprune needs a budget"),
        ({"reduce__spec": "divprune:0"}, "at least 1, got 0"),
        ({"reduce__spec": "divprune:2", "reduce__window": 4}, "cannot give each of 6 windows at least 1"),
        ({"reduce__spec": "divprune:0.0001"}, "of the video's 5376 visual tokens is below one token"),
        ({"video__start": 5.0}, "no frames lie in the range"),
    ],
)
def test_preflight_refuses(clip: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        preflight(config_of(clip, "demo", 2, **changes))
    assert "\n" not in str(caught.value)


def test_method_and_frames_come_from_the_configuration(clip: Path) -> None:
    method, budget = method_of(ReduceConfig(spec="evs:25%"))
    assert method.name == "evs" and budget == Budget.ratio(0.25)
    assert [r.index for r in planned_frames(VideoConfig(paths=(str(clip),), fps=5.0)).refs] == list(range(0, 21, 2))
    assert len(planned_frames(VideoConfig(paths=("clip:carphone_pristine",), frames=3))) == 3


def test_the_command_and_the_library_know_the_same_schedules() -> None:
    from launch.config_model import SCHEDULES
    from tokenring.schedules import NAMES

    assert SCHEDULES == NAMES

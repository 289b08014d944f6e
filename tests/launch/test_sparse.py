"""Sparse prefill in the main job: theta = infinity is the dense run, any number of ranks computes the same pairs, and it says so."""

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
    AnchorSection,
    AttentionConfig,
    RunConfig,
)
from launch.errors import ConfigError
from launch.models.demo import DemoAdapter
from launch.preflight import preflight
from launch.progress import Log
from launch.records import RankRecord, merge, verified
from launch.report import as_text
from sparse_attn import AnchorConfig, TunedConfig
from tests.launch import runs, tiny_models
from tests.pool import Pool

HEADS = tiny_models.TEXT["num_attention_heads"]
THETAS = {"qwen25": 1.0, "qwen3": 2.4, "llava": 1.0}
SMALL = {"block": 8, "step": 2, "dense": "never", "last": 0}


config_of = partial(
    runs.config_of, reduce__spec="uniform:0.5", reduce__window=8, attention__kind="anchor", generate__max_new_tokens=4
)


def small(**changes: Any) -> dict[str, Any]:
    return {f"anchor__{name}": value for name, value in {**SMALL, **changes}.items()}


def run_ranks(group: Any, configs: list[RunConfig]) -> list[RankRecord]:
    torch.set_num_threads(1)
    DemoAdapter.load = classmethod(tiny_models.demo)
    return [replace(pipeline.run(c, group, Log()), rank=group.rank(), world=group.size()) for c in configs]


def reports(pool: Pool, world: int, configs: list[RunConfig]) -> list[dict[str, Any]]:
    ranks = pool.run(world, run_ranks, configs)
    return [merge(records, engine="torchrun", config={}) for records in zip(*ranks)]


@pytest.mark.parametrize("family", list(tiny_models.MAKERS))
def test_every_family_prefills_sparsely_and_any_number_of_ranks_computes_the_same_pairs(
    pool: Pool, clip: Path, models: dict[str, str], family: str
) -> None:
    made = [config_of(clip, models[family], world, **small(theta=THETAS[family])) for world in (1, 3)]
    alone, spread = (reports(pool, world, [config])[0] for world, config in zip((1, 3), made))
    for report in (alone, spread):
        assert verified(report), report["verify"]
        assert report["schedule"] == "anchor" and report["attention"]["sparse"] == 3
        assert report["verify"]["columns"] > 100 and report["verify"]["columns_chosen_otherwise"] <= 1
        assert report["verify"]["beside_dense"]["kl"] > 0
    assert spread["generated_ids"] == alone["generated_ids"]
    assert spread["attention"]["density"] == pytest.approx(alone["attention"]["density"], rel=1e-3)
    assert spread["attention"]["density"] < 0.8
    assert alone["attention"]["bytes_sent"] == 0 < spread["attention"]["bytes_sent"] < spread["attention"]["ring_bytes"]
    assert spread["attention"]["bytes_sent"] < sum(map(sum, spread["bytes_sent"]))


def test_theta_infinity_is_the_dense_run(pool: Pool, clip: Path, models: dict[str, str]) -> None:
    sparse = config_of(clip, models["qwen3"], 2, **small(theta=float("inf"), dense="auto"))
    dense = config_of(clip, models["qwen3"], 2, attention__kind="exact")
    kept, plain = reports(pool, 2, [sparse, dense])
    assert kept["generated_ids"] == plain["generated_ids"] and verified(kept)
    assert "columns" not in kept["verify"] and plain["attention"] is None
    assert kept["attention"]["density"] == 1 and kept["attention"]["sparse"] == 0
    assert {layer["why"] for layer in kept["attention"]["layers"]} == {"theta keeps every column"}
    assert "3 dense" in as_text(kept) and "dense in layers 0 to 2: theta keeps every column" in as_text(kept)


def test_tuned_thetas_a_density_kept_rows_and_experts(
    pool: Pool, clip: Path, models: dict[str, str], tmp_path: Path
) -> None:
    sizes = {"block": 8, "step": 2, "dense": "never"}
    layers = {0: AnchorConfig(theta=(-50.0,) * HEADS, **sizes), 2: AnchorConfig(theta=(1.0,) * HEADS, **sizes)}
    TunedConfig(layers, "recall", 0.9, 0.9).save(tmp_path / "tuned.json")
    llava = models["llava"]
    tuned, asked, bare, kept, experts = reports(
        pool,
        2,
        [
            config_of(clip, llava, 2, anchor__tuned=str(tmp_path / "tuned.json")),
            config_of(clip, llava, 2, **small(density=0.5), attention__layout="contiguous"),
            config_of(clip, llava, 2, **small(theta=-50.0)),
            config_of(clip, llava, 2, **small(theta=-50.0, keep="text")),
            config_of(clip, "demo-moe", 2, **small(), reduce__spec="uniform:0.03", moe__ep=1),
        ],
    )
    assert all(verified(report) for report in (tuned, asked, bare, kept, experts))
    stripes = [layer["stripe_density"] for layer in tuned["attention"]["layers"]]
    assert stripes[0] == stripes[1] == 0 < stripes[2]
    assert asked["attention"]["density"] == pytest.approx(0.5, abs=0.12)
    assert bare["attention"]["density"] < kept["attention"]["density"] < 1
    assert bare["verify"]["columns"] == kept["verify"]["columns"] == 0
    assert experts["experts"] is not None and experts["attention"]["sparse"] == len(experts["attention"]["layers"])
    assert "Layers" in as_text(asked) and "of a dense ring" in as_text(asked)


def test_a_wrong_column_or_a_wrong_sum_does_not_verify(
    clip: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_attn.integrations import huggingface

    true = huggingface.anchor_attention

    def other_columns(q: Any, k: Any, v: Any, *, config: Any = None, **told: Any) -> Any:
        return true(q, k, v, config=config and replace(config, theta=config.theta - 1), **told)

    monkeypatch.setattr(huggingface, "anchor_attention", other_columns)
    config = config_of(clip, models["llava"], 1, **small(theta=1.0))
    record = pipeline.run(config, None, Log())
    assert record.verify["all_within_tolerance"] and not record.verify["columns_within_tolerance"]

    def other_sum(*given: Any, **told: Any) -> Any:
        out, *rest = true(*given, **told)
        return (out * (1.01 if told.get("group") is not None else 1), *rest)

    monkeypatch.setattr(huggingface, "anchor_attention", other_sum)
    assert not pipeline.run(config, None, Log()).verify["all_within_tolerance"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"attention__kind": "exact", "anchor__density": 0.2},
            "anchor.density is 0.2, which belongs to --attention anchor",
        ),
        ({"anchor__tuned": "/no/such/file.json"}, "anchor.tuned is '/no/such/file.json'"),
        ({"anchor__tuned": "OTHER"}, "with thetas of 5 heads; model .* has 6 query heads"),
    ],
)
def test_what_cannot_be_honoured_is_said_before_any_rank_starts(
    clip: Path, models: dict[str, str], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    other = tmp_path / "other.json"
    TunedConfig({0: AnchorConfig(theta=(1.0,) * 5)}, "recall", 0.9, 0.9).save(other)
    changes = {name: str(other) if value == "OTHER" else value for name, value in changes.items()}
    with pytest.raises(ConfigError, match=words):
        preflight(config_of(clip, models["qwen25"], 2, **changes))


def test_windows_are_refused_before_any_rank_starts(clip: Path, models: dict[str, str], tmp_path: Path) -> None:
    folder = shutil.copytree(models["qwen25"], tmp_path / "model")
    known = json.loads((folder / "config.json").read_text())
    known["text_config"]["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    (folder / "config.json").write_text(json.dumps(known))
    with pytest.raises(ConfigError, match=r"sliding_attention layers; .* give --attention exact"):
        preflight(config_of(clip, str(folder), 2))


def test_defaults_are_those_of_the_method() -> None:
    section, config = AnchorSection(), AnchorConfig()
    names = ("theta", "identify", "share", "dense")
    assert [getattr(section, name) for name in names] == [getattr(config, name) for name in names]


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'ring': with --attention anchor only wanted rows travel"):
        AttentionConfig(kind="anchor", schedule="ring")
    with pytest.raises(ConfigError, match=r"anchor\.identify is 'lse': tuned\.json says this itself"):
        AnchorSection(tuned="tuned.json", identify="lse")

"""Links that a run is told of, or measures: they choose the schedule and the dispatcher, and nothing of what is written."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import encoder, pipeline
from launch.config import RunConfig
from launch.errors import ConfigError
from launch.experts import Experts
from launch.preflight import preflight
from launch.progress import Log
from launch.records import RankRecord, merge
from launch.report import as_text
from tests.launch import runs, tiny_models
from tests.pool import Pool
from tokenring.topology import Topology

config_of = partial(runs.config_of, reduce__spec="uniform:0.2", reduce__window=8, generate__max_new_tokens=3)
LINKS = {"one cable": Topology.bus(4, 0.01), "all fast": Topology.mesh(4, 10.0)}


def watch(group: Any, config: RunConfig) -> tuple[RankRecord, int | None]:
    """One run, and the ranks whose links the dispatcher was told of."""
    torch.set_num_threads(1)
    told, whole, spread = [], encoder.load, Experts.spread.__func__

    def seen(cls: type[Experts], *given: Any) -> Experts | None:
        experts = spread(cls, *given)
        told.extend([experts.block.topology] if experts is not None else [])
        return experts

    encoder.load, Experts.spread = tiny_models.vit, classmethod(seen)
    try:
        record = pipeline.run(config, group, Log())
    finally:
        encoder.load, Experts.spread = whole, classmethod(spread)
    record = replace(record, rank=group.rank(), world=group.size())
    return record, told[0].world if told and told[0] is not None else None


def test_the_links_of_a_file_choose_the_schedule_and_not_the_words(
    pool: Pool, clip: Path, models: dict[str, str], tmp_path: Path
) -> None:
    chosen, words, sent = set(), set(), set()
    for name, topology in LINKS.items():
        topology.save(tmp_path / "links.json")
        config = config_of(clip, models["llava"], 4, engine__topology=str(tmp_path / "links.json"))
        preflight(config)
        record = pool.run(4, watch, config)[0][0]
        assert record.links == topology.to_dict() and record.verify["same_tokens"], name
        chosen.add(record.schedule)
        words.add(tuple(record.generated_ids))
        sent.add(tuple(record.bytes_sent.items()))
    assert len(chosen) == len(sent) >= 2 and len(words) == 1


def test_measured_links_are_those_of_the_ranks_that_experts_are_spread_over(
    pool: Pool, clip: Path, tmp_path: Path
) -> None:
    torch.manual_seed(8)
    source = str(tiny_models.MIXTURES["mixtral"](tmp_path))
    config = config_of(clip, source, 4, engine__topology="probe", moe__ep=2)
    told = pool.run(4, watch, config)
    assert [ranks for _, ranks in told] == [2, 2, 2, 2]
    links = [Topology.from_dict(record.links) for record, _ in told]
    assert len(set(links)) == 1 and links[0].world == 4 and links[0].costs is not None
    report = merge([record for record, _ in told], engine="torchrun", config={})
    assert report["links"]["world"] == 4 and report["verify"]["same_tokens"]
    assert f"schedule {report['schedule']}, links known as a {links[0].kind} of" in as_text(report)


@pytest.mark.parametrize(
    ("world", "given", "message"),
    [
        (3, "links.json", r"describes 4 ranks, and engine\.nproc is 3; give a file for 3 ranks, or probe"),
        (4, "none.json", r"engine\.topology is '.*none\.json'.*; give probe, or a file of Topology\.save"),
        (4, "words.json", r"engine\.topology is '.*words\.json'.*; give probe, or a file of Topology\.save"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_ranks_start(
    world: int, given: str, message: str, clip: Path, models: dict[str, str], tmp_path: Path
) -> None:
    LINKS["all fast"].save(tmp_path / "links.json")
    (tmp_path / "words.json").write_text("fast ones")
    with pytest.raises(ConfigError, match=message):
        preflight(config_of(clip, models["llava"], world, engine__topology=str(tmp_path / given)))


def test_a_file_of_all_ranks_says_nothing_of_a_part_of_them(clip: Path, tmp_path: Path) -> None:
    source = str(tiny_models.MIXTURES["mixtral"](tmp_path / "model"))
    LINKS["all fast"].save(tmp_path / "links.json")
    told = {"engine__topology": str(tmp_path / "links.json"), "moe__ep": 2}
    with pytest.raises(ConfigError, match="experts are spread over 2 of them at a time; give --topology probe, or a"):
        preflight(config_of(clip, source, 4, **told))
    preflight(config_of(clip, source, 4, **told, moe__dispatcher="dedup"))

"""Mixture-of-experts models of transformers, spread by the launcher: they write what they write on one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launch import encoder, pipeline
from launch.config import RunConfig
from launch.errors import ConfigError
from launch.models import check, mixture
from launch.models.expert_block import ExpertBlock
from launch.preflight import preflight
from launch.progress import Log
from launch.records import RankRecord, merge
from moe.integrations.huggingface import expert_modules
from tests.launch import tiny_models
from tests.launch.drift import make_clip
from tests.launch.runs import config_of
from tests.pool import Pool

TIGHT = 5e-5


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "drift.mp4", 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    torch.manual_seed(8)
    return {name: str(maker(tmp_path_factory.mktemp(name))) for name, maker in tiny_models.MIXTURES.items()}


def experts_of(clip: Path, model: str, world: int, **moe: Any) -> RunConfig:
    told = {f"moe__{name}": value for name, value in moe.items()} | {"reduce__spec": "uniform:0.1"}
    return config_of(clip, model, world, generate__max_new_tokens=4, generate__prompt="Why?", **told)


def watch(group: Any, config: RunConfig, spoil: int | None = None) -> RankRecord:
    """One run; rank `spoil` gets an expert wrong. No rank but the one that verifies reads more than its part of its experts."""
    torch.set_num_threads(1)
    whole, spread = encoder.load, mixture.spread

    def spoiled(model: nn.Module, block: ExpertBlock, keep_whole: bool) -> list[mixture.HeldExperts]:
        read = {tuple(module.down_proj.shape) for module in expert_modules(model).values()}
        ep, etp = (1 if keep_whole or g is None else g.size() for g in (block.ep_group, block.etp_group))
        text = model.config.get_text_config()
        width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
        assert read == {(block.experts // ep, text.hidden_size, width // etp)}
        assert keep_whole == (group.rank() == 0)
        layers = spread(model, block, keep_whole)
        if spoil == group.rank():
            layers[0].module.down_proj.data[0] *= 1.05
        return layers

    encoder.load, mixture.spread = tiny_models.vit, spoiled
    try:
        return replace(pipeline.run(config, group, Log()), rank=group.rank(), world=group.size())
    finally:
        encoder.load, mixture.spread = whole, spread


# model, ranks, experts and choices of a token, layers that have experts, settings, EP x ETP that come of them
RUNS = [
    ("qwen3_moe", 4, (8, 3), 3, {"ep": 4, "dispatcher": "dedup"}, (4, 1)),
    ("qwen3_moe", 4, (8, 3), 3, {"ep": 2, "etp": 2, "chunks": 2}, (2, 2)),
    ("mixtral", 4, (4, 2), 3, {}, (4, 1)),
    ("mixtral", 3, (4, 2), 3, {"etp": 1}, (1, 1)),
    ("qwen3_vl_moe", 2, (8, 2), 2, {"ep": 1, "etp": 2}, (1, 2)),
    ("qwen3_vl_moe", 4, (8, 2), 2, {"dispatcher": "hierarchical", "ranks_per_node": 2}, (4, 1)),
    ("llava_moe", 3, (6, 2), 3, {"dispatcher": "alltoall"}, (3, 1)),
]


@pytest.mark.parametrize(
    ("name", "world", "sizes", "layers", "moe", "mapping"), RUNS, ids=[f"{r[0]}-{r[1]}-{i}" for i, r in enumerate(RUNS)]
)
def test_a_mixture_writes_what_it_writes_on_one_rank(
    pool: Pool, clip: Path, models: dict[str, str], name: str, world: int, sizes, layers: int, moe, mapping
) -> None:
    records = pool.run(world, watch, experts_of(clip, models[name], world, **moe))
    report = merge(records, engine="torchrun", config={})
    checked, found, rows = report["verify"], report["experts"], sum(report["tokens_per_rank"])
    assert checked["same_tokens"] and checked["written_within_tolerance"] and checked["all_within_tolerance"]
    assert max(checked["max_logit_diff"], checked["max_logit_diff_all"]) <= TIGHT
    assert (found["experts"], found["topk"]) == sizes and (found["ep"], found["etp"]) == mapping
    assert sum(found["tokens_per_expert"]) == rows * sizes[1] * layers
    assert (sum(map(sum, found["bytes_sent"])) > 0) == (mapping != (1, 1))


def test_one_wrong_expert_on_one_rank_is_found(pool: Pool, clip: Path, models: dict[str, str]) -> None:
    config = experts_of(clip, models["mixtral"], 2)
    records = pool.run(2, watch, config, 1)
    assert not records[0].verify["all_within_tolerance"]


def test_whole_experts_come_back_and_go_again(models: dict[str, str]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models["mixtral"]).eval()
    ids = torch.arange(7)[None]
    with torch.no_grad():
        before = model(ids).logits
        layers = mixture.spread(model, ExpertBlock(experts=4, topk=2), True)
        spread = model(ids).logits
        with mixture.alone(layers):
            whole = model(ids).logits
    assert torch.equal(before, whole) and torch.allclose(before, spread, atol=1e-5)
    assert sum(int(layer.prefill_tokens.sum()) for layer in layers) == 7 * 2 * 3
    layers[0].whole = None
    with pytest.raises(ValueError, match="keep_whole=True"), mixture.alone(layers):
        pass


@pytest.mark.parametrize(
    ("name", "moe", "message"),
    [
        ("qwen3_moe", {"ep": 3}, "rule 'etp x ep x pp divides world' is broken"),
        ("mixtral", {"ep": 8}, "rule 'ep divides num_experts' is broken: ep=8, num_experts=4"),
        ("llava_moe", {"experts": 16}, "moe.experts is 16, but model .* has 6 experts, 2 for each token; leave it out"),
        ("qwen3_vl_moe", {"etp": 16}, "rule 'etp x ep x pp divides world'"),
    ],
)
def test_settings_a_mixture_cannot_use_are_refused_before_a_rank_starts(
    clip: Path, models: dict[str, str], name: str, moe: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        preflight(experts_of(clip, models[name], 8, **moe))
    assert "\n" not in str(caught.value)


def test_experts_are_refused_where_a_directory_has_none(clip: Path, tmp_path: Path) -> None:
    folder = tiny_models.qwen3(tmp_path / "dense")
    assert check(folder) == "qwen3_vl"
    with pytest.raises(ConfigError, match=r"moe\.ep is 2, but model .* has no experts"):
        preflight(experts_of(clip, str(folder), 2, ep=2))

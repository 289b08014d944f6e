"""Experts over ranks: identical experts behind a random router must write what the dense model writes, wherever they live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launch import experts, pipeline
from launch.config import RunConfig
from launch.config_model import DISPATCHERS
from launch.errors import ConfigError
from launch.models import upcycled
from launch.models.demo import DemoAdapter
from launch.models.expert_block import ExpertBlock
from launch.models.upcycled import SpreadLayer, upcycle
from launch.progress import Log
from launch.records import RankRecord, merge
from launch.report import as_text
from moe import Folding
from moe.dispatch import DISPATCHERS as BUILT
from tests.launch import tiny_models
from tests.launch.drift import make_clip
from tests.launch.runs import config_of
from tests.pool import Pool

LAYERS = 3
FOLDINGS = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1)]
TIGHT = 5e-5


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "drift.mp4", 3)


def experts_of(clip: Path, world: int = 4, model: str = "demo-moe", dtype: str = "float32", **moe: Any) -> RunConfig:
    told = {f"moe__{name}": value for name, value in moe.items()}
    told |= {"model__dtype": dtype, "reduce__spec": "uniform:0.03"}
    return config_of(clip, model, world, generate__max_new_tokens=4, generate__prompt="Why?", **told)


def watch(group: Any, configs: Sequence[RunConfig]) -> list[RankRecord]:
    """One run after the other, with tiny weights."""
    torch.set_num_threads(1)
    DemoAdapter.load = classmethod(tiny_models.demo)
    return [replace(pipeline.run(config, group, Log()), rank=group.rank(), world=group.size()) for config in configs]


def watch_with_a_wrong_expert(group: Any, config: RunConfig) -> list[RankRecord]:
    """Rank 2 holds an expert that is none of the dense network's copies."""

    def spoiled(*given: Any) -> list[SpreadLayer]:
        layers = upcycle(*given)
        if group.rank() == 2:
            layers[1].layer.experts.down.data[0] *= 1.01
        return layers

    upcycled.upcycle = spoiled
    try:
        return watch(group, [config])
    finally:
        upcycled.upcycle = upcycle


def merged(records: Sequence[RankRecord]) -> dict[str, Any]:
    return merge(records, engine="torchrun", config={})


@pytest.fixture(scope="module")
def dense(pool: Pool, clip: Path) -> list[int]:
    """What the dense demo writes on one rank."""
    ((record,),) = pool.run(1, watch, [experts_of(clip, 1, "demo")])
    assert record.experts is None and record.verify["same_tokens"]
    return record.generated_ids


@pytest.mark.parametrize(("ep", "etp"), FOLDINGS)
def test_every_folding_and_dispatcher_writes_what_the_dense_demo_writes(
    pool: Pool, clip: Path, dense: list[int], ep: int, etp: int
) -> None:
    configs = [experts_of(clip, ep=ep, etp=etp, dispatcher=name) for name in DISPATCHERS]
    if ep == 4:
        configs.append(experts_of(clip, ep=4, dispatcher="hierarchical", ranks_per_node=2))
    for config in configs:
        report = merged([record for (record,) in pool.run(4, watch, [config])])
        assert report["generated_ids"] == dense
        check = report["verify"]
        assert check["same_tokens"] and check["written_within_tolerance"] and check["all_within_tolerance"]
        assert max(check["max_logit_diff"], check["max_logit_diff_all"]) <= TIGHT
        check_counts(report, ep, etp, config.moe.dispatcher, config.moe.ranks_per_node)


def check_counts(report: dict[str, Any], ep: int, etp: int, dispatcher: str, node: int | None) -> None:
    found, rows = report["experts"], sum(report["tokens_per_rank"])
    assert (found["ep"], found["etp"], found["edp"]) == (ep, etp, 4 // (ep * etp))
    assert found["dispatcher"] in ((dispatcher,) if dispatcher != "auto" else ("dedup", "allgather"))
    assert sum(found["tokens_per_expert"]) == rows * 2 * LAYERS and min(found["tokens_per_expert"]) > 0
    assert sum(found["tokens_per_rank"]) == rows * 2 * LAYERS * etp
    sent, notes = found["bytes_sent"], found["metadata_bytes_sent"]
    for a in range(4):
        for b in range(4):
            together = a != b and a // (ep * etp) == b // (ep * etp)
            peers = together and (a % etp == b % etp or a // etp == b // etp)
            if node is not None:  # between nodes only to the rank of the same place
                peers = peers and (a % node == b % node or a // node == b // node)
            assert (sent[a][b] > 0) == (notes[a][b] > 0) == peers
            assert sent[a][b] == sent[b][a], "what is dispatched one way is combined the other way"


def test_one_wrong_expert_on_one_rank_is_found(pool: Pool, clip: Path) -> None:
    records = [record for (record,) in pool.run(4, watch_with_a_wrong_expert, experts_of(clip, ep=4))]
    assert not records[0].verify["all_within_tolerance"]
    assert records[0].verify["max_logit_diff_all"] > 20 * TIGHT


@pytest.mark.parametrize(
    "moe",
    [
        {"experts": 8, "topk": 1},
        {"experts": 4, "topk": 4},
        {"experts": 8, "topk": 3, "chunks": 3},
        {"experts": 1, "topk": 1, "etp": 2},
        {"experts": 12, "topk": 5, "ep": 2, "etp": 2, "chunks": 2, "dispatcher": "dedup"},
    ],
)
def test_any_number_of_experts_and_choices_equals_the_dense_demo(pool: Pool, clip: Path, dense, moe) -> None:
    report = merged([record for (record,) in pool.run(4, watch, [experts_of(clip, **moe)])])
    assert report["generated_ids"] == dense
    assert max(report["verify"]["max_logit_diff"], report["verify"]["max_logit_diff_all"]) <= TIGHT
    rows = sum(report["tokens_per_rank"])
    assert sum(report["experts"]["tokens_per_expert"]) == rows * moe["topk"] * LAYERS


def test_bytes_of_dispatch_are_counted_to_the_byte(pool: Pool, clip: Path) -> None:
    config = experts_of(clip, experts=4, topk=4, dispatcher="dedup")  # every token to every rank
    report = merged([record for (record,) in pool.run(4, watch, [config])])
    rows, later = report["tokens_per_rank"], len(report["generated_ids"]) - 1
    for a in range(4):
        for b in range(4):
            # one row for each token of a on its way to b, and one home for each token of b; a later token lies on both
            moved = 0 if a == b else rows[a] + rows[b] + 2 * later
            assert report["experts"]["bytes_sent"][a][b] == moved * LAYERS * tiny_models.TEXT["hidden_size"] * 4


def test_sixteen_bit_experts_are_verified_against_their_own_noise(pool: Pool, clip: Path) -> None:
    records = [record for (record,) in pool.run(4, watch, [experts_of(clip, dtype="bfloat16", topk=1)])]
    assert records[0].verify["written_within_tolerance"] and records[0].verify["all_within_tolerance"]


def test_three_ranks_hold_two_experts_each(pool: Pool, clip: Path) -> None:
    report = merged([record for (record,) in pool.run(3, watch, [experts_of(clip, 3, experts=6)])])
    assert report["experts"]["ep"] == 3 and report["verify"]["all_within_tolerance"]


def rows_of_each(group: Any, counts: Sequence[int], block: dict[str, Any]) -> tuple[float, list[int]]:
    """Largest difference from the dense network over passes with other numbers of rows on every rank, in float64."""
    made = Folding(world=4, cp=4, ep=2, etp=2).create_groups(group=group)
    mlp = dense_mlp()
    random = torch.Generator().manual_seed(5)
    own = SpreadLayer(mlp, ExpertBlock(ep_group=made["ep"], etp_group=made["etp"], **block), random, keep_dense=True)
    worst = 0.0
    with torch.no_grad():
        for shift in range(4):
            rows = counts[(group.rank() + shift) % 4]
            x = torch.randn(1, rows, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(group.rank()))
            out = own(x)
            assert out.shape == x.shape
            worst = max([worst, *(out - mlp(x)).abs().flatten().tolist()])
            with upcycled.alone([own]):
                assert torch.equal(own(x), mlp(x))
    return worst, own.prefill_tokens.tolist()


def dense_mlp() -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(4)
    return (
        LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2))
        .double()
        .requires_grad_(False)
    )


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_ranks_without_rows_take_part(pool: Pool, dispatcher: str) -> None:
    block = {"experts": 6, "topk": 2, "dispatcher": dispatcher, "chunks": 2}
    found = pool.run(4, rows_of_each, [3, 0, 5, 1], block)
    assert max(worst for worst, _ in found) < 1e-12
    # the first pass: ranks 0 to 3 held 3, 0, 5, 1 rows, and both ranks of an expert's ETP group count its tokens
    assert sum(sum(tokens) for _, tokens in found) == (3 + 0 + 5 + 1) * 2 * 2


def test_the_dense_networks_are_not_kept_where_nobody_needs_them() -> None:
    layer = SpreadLayer(dense_mlp(), ExpertBlock(experts=2, topk=1), torch.Generator(), keep_dense=False)
    assert layer.dense is None
    with pytest.raises(ValueError, match="keep_dense=True"), upcycled.alone([layer]):
        pass


def test_the_page_shows_experts_beside_everything_else(pool: Pool, clip: Path) -> None:
    records = [record for (record,) in pool.run(4, watch, [experts_of(clip, ep=2, dispatcher="dedup")])]
    page = as_text(merged(records))
    assert "8 experts, 2 for each token, EP 2 x ETP 1 x EDP 2, dispatcher dedup" in page
    assert "the busiest rank has" in page and "sent for all else" in page
    with pytest.raises(ValueError, match="ranks disagree about their experts"):
        merged([replace(records[0], experts=None), *records[1:]])


def test_nodes_are_the_machines_where_they_cut_a_block_evenly() -> None:
    assert experts.node_size([1] * 4 + [2] * 4, block=8, etp=2) == 4
    assert experts.node_size([1] * 4 + [2] * 4, block=4, etp=2) is None
    assert experts.node_size([1, 1, 1, 2], block=4, etp=1) is None
    assert experts.node_size([1, 1, 2, 2, 3, 3], block=6, etp=3) is None
    assert experts.node_size([1, 2, 1, 2], block=4, etp=1) is None


def test_the_command_and_the_library_know_the_same_dispatchers() -> None:
    assert set(DISPATCHERS) == set(BUILT)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"ep": 3}, "moe.ep is 3.*rule 'etp x ep x pp divides world' is broken.*nearest legal choice"),
        ({"etp": 3}, "rule 'etp x ep x pp divides world' is broken"),
        ({"ep": 4, "etp": 2}, "etp=2 x ep=4 x pp=1 = 8 does not divide world=4"),
        ({"experts": 6, "ep": 4}, "rule 'ep divides num_experts' is broken: ep=4, num_experts=6"),
        ({"ep": 4, "ranks_per_node": 3}, "ranks_per_node is 3: it must divide ep x etp = 4"),
        ({"ep": 2, "etp": 2, "ranks_per_node": 1}, "be a multiple of etp = 2"),
    ],
)
def test_a_folding_that_breaks_a_rule_is_refused_before_a_rank_starts(moe: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        experts.check_experts(experts_of(Path("none"), **moe), {"intermediate_size": 1536})
    assert "\n" not in str(caught.value)


def test_ep_left_out_is_all_that_experts_and_ranks_allow() -> None:
    def ep(world: int, **moe: Any) -> int:
        config = experts_of(Path("none"), world, **moe)
        return experts.folding_of(config, experts.sizes_of(config, {"intermediate_size": 1536})).ep

    assert (ep(4), ep(3), ep(6), ep(16), ep(8, etp=4), ep(6, experts=12)) == (4, 1, 2, 8, 2, 6)

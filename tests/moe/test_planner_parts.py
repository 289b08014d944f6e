"""The planner's parts against independent counts: groups and links, rows, memory, the search."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe import Folding, traffic
from moe.planner import Hardware, Job, model, plan, search
from moe.planning.costs import Costs
from moe.planning.layers import Layers
from moe.planning.memory import layers_in_flight, memory, rank_parameters
from moe.planning.places import Span, groups, rows, span
from moe.traffic import by_link, wanted

H100 = Hardware.load("h100")


# -- links ----------------------------------------------------------------------------------------------------------------


def test_nested_experts_lie_inside_data_parallelism() -> None:
    f = Folding(world=16, tp=2, cp=2, pp=2, ep=2, etp=2)
    assert groups(f, "etp-ep", "nested")[:2] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert groups(f, "etp-ep", "folded")[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups(f, "edp", "nested")[0] == [0, 2]
    without_cp = Folding(world=16, tp=2, pp=2, ep=2, etp=2)
    for axes in ("etp-ep", "edp", "tp", "cp-dp", "pp"):
        assert sorted(groups(without_cp, axes, "nested")) == sorted(groups(without_cp, axes, "folded"))


def test_every_nested_group_is_a_part_of_the_world() -> None:
    f = Folding(world=48, tp=2, cp=3, pp=2, ep=2, etp=2)
    for axes, size in (("etp-ep", 4), ("edp", 6)):
        found = groups(f, axes, "nested")
        assert {len(group) for group in found} == {size}
        assert sorted(rank for group in found for rank in group) == list(range(48))
    stages = [{rank // 24 for rank in group} for axes in ("etp-ep", "edp") for group in groups(f, axes, "nested")]
    assert all(len(stage) == 1 for stage in stages)


@pytest.mark.parametrize("per_node", [2, 8, 5])
def test_spans_are_those_of_the_folding_groups(per_node: int) -> None:
    for f in Folding.enumerate(world=24, pp=(1, 2), tp=(1, 2, 3), cp=(1, 2), ep=(1, 4, 6), etp=(1, 2)):
        for axes in ("tp", "cp", "cp-dp", "pp", "etp-ep", "edp"):
            found = f.groups(axes)
            counts = [[sum(r // per_node == n for r in g) for n in {r // per_node for r in g}] for g in found]
            expected = Span(len(found[0]), min(map(min, counts)), max(map(len, counts)))
            assert span(f, axes, "folded", per_node) == expected


def test_context_parallelism_pushes_nested_experts_off_the_node() -> None:
    f = Folding(world=64, tp=2, cp=4, ep=8, etp=2)
    nested, folded = (rows(f, mapping, 8, "alltoall", 64, 8) for mapping in ("nested", "folded"))
    assert nested.between == pytest.approx(7.0) and nested.inside == 0
    assert folded.between == pytest.approx(4.0) and folded.inside == pytest.approx(3.0)


@pytest.mark.parametrize("name", ["alltoall", "dedup", "allgather", "hierarchical"])
def test_rows_equal_the_traffic_of_each_link(name: str) -> None:
    f = Folding(world=32, tp=2, ep=16, etp=1)
    nodes = {"ranks_per_node": 8} if name == "hierarchical" else {}
    sent = traffic(name, num_experts=64, topk=8, ep=16, tokens=1, row_bytes=1, **nodes)
    links, found = by_link(sent, 8), rows(f, "folded", 8, name, 64, 8)
    assert found.inside * 16 == pytest.approx(links["inside"])
    assert found.between * 16 == pytest.approx(links["between"])
    assert found.etp_inside == found.etp_between == 0


def test_known_rows() -> None:
    cross = {name: rows(Folding(world=16, ep=16), "folded", 8, name, 64, 8).between for name in ("alltoall", "dedup")}
    assert cross["alltoall"] == pytest.approx(4.0)
    assert cross["dedup"] == pytest.approx(8 * wanted(64, 8, 4))
    assert rows(Folding(world=8, etp=8), "folded", 8, "alltoall", 64, 8).etp_inside == pytest.approx(56)


def test_a_ring_shares_the_ports_of_its_node() -> None:
    costs = Costs(H100.but(inside_latency_us=0, between_latency_us=0))
    one, four = (costs.ring(1e9, Span(16, per_node, 16 // per_node)) for per_node in (1, 4))
    assert one == pytest.approx(1e9 * 15 / 16 / H100.between_rate)
    assert one == pytest.approx(4 * four)
    assert costs.ring(1e9, Span(8, 8, 1)) == pytest.approx(1e9 * 7 / 8 / H100.inside_rate)
    assert costs.ring(1e9, Span(1, 1, 1)) == 0


def test_large_products_reach_the_fitted_share_and_thin_ones_do_not() -> None:
    costs = Costs(H100)

    def reached(m: int, n: int, k: int, count: int = 1) -> float:
        return 2 * m * n * k * count / costs.gemm(m, n, k, count=count) / (H100.peak("bf16") * H100.gemm_bf16)

    assert 0.9 < reached(16384, 16384, 8192) <= 1
    assert reached(64, 4096, 4096) < 0.3
    assert reached(4096, 4096, 64) < reached(4096, 4096, 1024)
    assert reached(100, 2048, 4096, count=64) < reached(800, 2048, 4096, count=8)


def test_overlap_hides_the_exchange_but_not_more_than_there_is_to_compute() -> None:
    f = Folding(world=64, tp=1, ep=64)
    none, most = (plan("qwen2-57b-a14b", f, global_batch=64, exchange_overlap=x, recompute="none") for x in (0.0, 1.0))
    assert most.parts["expert exchange"] >= 0
    shown = sum(seconds for part, seconds in none.parts.items() if part != "expert exchange")
    assert most.seconds == pytest.approx(max(shown, none.seconds / 2), rel=0.2) and most.seconds < none.seconds
    slow = H100.but(between_efficiency=0.01)
    before, after = (
        plan("qwen2-57b-a14b", f, global_batch=64, exchange_overlap=x, recompute="none", hardware=slow)
        for x in (0.0, 1.0)
    )
    assert after.parts["expert exchange"] > 0.8 * before.parts["expert exchange"]


# -- memory ---------------------------------------------------------------------------------------------------------------


def test_parameters_of_ranks_add_up_to_the_model() -> None:
    m, f = model("mixtral-8x22b"), Folding(world=64, tp=2, pp=2, ep=4, etp=2)
    layers = Layers(m, f, Job(global_batch=64), H100)
    routed, other = rank_parameters(layers)
    assert routed * 4 * 2 * 2 == m.moe_layers * m.num_experts * m.expert_parameters
    assert other * 2 * 2 == m.dense_parameters + m.embedding_parameters


def test_states_are_sharded_over_the_right_groups() -> None:
    m, f = model("mixtral-8x22b"), Folding(world=64, tp=2, ep=4, etp=1)
    held = memory(Layers(m, f, Job(global_batch=64), H100), "none", 0)
    routed, other = rank_parameters(Layers(m, f, Job(global_batch=64), H100))
    assert held.weights == pytest.approx(2 * (routed + other))
    assert held.gradients == pytest.approx(4 * (routed + other))
    assert held.optimizer == pytest.approx(12 * (routed / 16 + other / 32))
    whole = memory(Layers(m, f, Job(global_batch=64, sharding="parameters"), H100), "none", 0)
    assert whole.weights + whole.gradients + whole.optimizer == pytest.approx(18 * (routed / 16 + other / 32))
    assert whole.start == pytest.approx(2 * (routed + other))
    shards = memory(Layers(m, f, Job(global_batch=64, sharding="parameters", sharded_init=True), H100), "none", 0)
    assert shards.start == 0


def simulated_in_flight(stages: int, chunks: int, count: int) -> int:
    """Chunks that the first stage has started before it runs a backward, by Megatron-Core's count of warm-up passes."""
    warmup = stages - 1 if chunks == 1 else 2 * (stages - 1) + (chunks - 1) * stages
    order = ["F"] * min(warmup, count * chunks)
    rest = count * chunks - len(order)
    order += ["F", "B"] * rest + ["B"] * len(order)
    most = held = 0
    for step in order:
        held += 1 if step == "F" else -1
        most = max(most, held)
    assert held == 0
    return most


@pytest.mark.parametrize(("pp", "v", "batch"), [(1, 1, 64), (4, 1, 64), (4, 7, 64), (4, 14, 256), (8, 7, 64)])
def test_activations_in_flight_are_those_of_the_schedule(pp: int, v: int, batch: int) -> None:
    f = Folding(world=64, pp=pp, ep=8)
    layers = Layers(model("mixtral-8x22b"), f, Job(global_batch=batch, interleave=v), H100)
    count = batch // f.dp
    assert layers_in_flight(layers) == simulated_in_flight(pp, v, count) * 56 / pp / v


def test_fp8_keeps_less_for_the_backward_pass() -> None:
    f = Folding(world=128, tp=2, pp=8, ep=8)
    wide, narrow = (plan("mixtral-8x22b", f, global_batch=256, precision=p, recompute="none") for p in ("bf16", "fp8"))
    assert narrow.memory.activations < wide.memory.activations
    assert narrow.memory.weights > wide.memory.weights


def test_the_guide_runs_and_prints_what_it_says(capsys) -> None:
    text = (Path(__file__).parents[2] / "docs" / "moe_planner.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    exec(compile(code, "moe_planner.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    said = [line.split("  # ")[1] for line in code.splitlines() if "  # " in line]
    assert len(said) == 3 and all(line in printed for line in said)


# -- search ---------------------------------------------------------------------------------------------------------------


def test_the_search_models_every_legal_folding_and_loses_none() -> None:
    limits = {"cp": 1, "tp": (1, 2, 4), "pp": (1, 2, 4), "etp": (1, 2)}
    found = search("mixtral-8x7b", 32, global_batch=128, limits=limits, micro_batches=(1, 3))
    m = model("mixtral-8x7b")
    sizes = {"heads": 32, "kv_heads": 8, "layers": 32, "sequence": 4096, "num_experts": 8, "expert_ffn": m.expert_ffn}
    legal = list(Folding.enumerate(world=32, **sizes, **limits))
    assert len(found.steps) + len(found.too_big) + len(found.refused) == 2 * len(legal)
    assert {f for f, _ in found.refused} <= set(legal) and all("no multiple" in why for _, why in found.refused)
    assert [s.seconds for s in found.steps] == sorted(s.seconds for s in found.steps)
    again = min((s for f in legal for s in [plan(m, f, global_batch=128)] if s.fits), key=lambda s: s.seconds)
    assert found.best.folding == again.folding and found.best.seconds == again.seconds
    assert str(len(found.steps)) in found.table().splitlines()[0]


def test_the_best_folding_beats_the_papers_own_choice_or_equals_it() -> None:
    for name, world, paper in (
        ("mixtral-8x22b", 128, Folding(world=128, tp=2, pp=8, ep=8)),
        ("qwen2-57b-a14b", 64, Folding(world=64, tp=2, pp=4, ep=4)),
    ):
        found = search(name, world, global_batch=256, limits={"cp": 1, "etp": 1, "tp": (1, 2, 4), "pp": (2, 4, 8)})
        theirs = plan(name, paper, global_batch=256)
        assert found.best.seconds <= theirs.seconds
        assert theirs.seconds < 1.1 * found.best.seconds


def test_a_model_that_fits_nowhere_is_said_so() -> None:
    found = search("llama3-8x70b", 8, global_batch=8, limits={"cp": 1})
    assert not found.steps and found.too_big
    with pytest.raises(ValueError, match=r"no folding works: .* do not fit in memory.*give more ranks"):
        _ = found.best
    with pytest.raises(ValueError, match="world is 0"):
        search("mixtral-8x7b", 0, global_batch=8)


def test_a_number_that_hardware_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match="Hardware has no 'nvlink'; give one of name"):
        H100.but(nvlink=900)

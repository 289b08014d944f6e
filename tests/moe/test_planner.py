"""The folding planner: its claims about published steps, what must never make a step slower, and what it refuses."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe import Folding
from moe.planner import (
    FP8,
    FREE,
    MODELS,
    TABLE,
    Hardware,
    Job,
    ModelConfig,
    fit,
    held_out,
    model,
    plan,
    report,
    shipped,
)

H100 = Hardware.load("h100")
ROWS = (*TABLE, *FP8)
PAPER_MODELS = sorted({row.model for row in TABLE})


def figures(name: str) -> list[tuple[float, float]]:
    """(published, modelled) of every row of a model; out of memory is 0 on either side."""
    found = [(row.mfu or 0.0, row.step(H100)) for row in TABLE if row.model == name]
    return [(known, step.mfu if step.fits else 0.0) for known, step in found]


# -- published rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_methods_come_in_the_published_order(name: str) -> None:
    rows = sorted(figures(name))
    assert len(rows) == 5
    for (slow, modelled_slow), (fast, modelled_fast) in pairwise(rows):
        assert modelled_slow < modelled_fast or slow == fast == modelled_slow == modelled_fast == 0


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_what_runs_out_of_memory_is_what_the_paper_says(name: str) -> None:
    assert [known == 0 for known, _ in figures(name)] == [modelled == 0 for _, modelled in figures(name)]


def test_folding_is_never_below_its_unfolded_row() -> None:
    for name in PAPER_MODELS:
        rows = {row.method: row.modelled(H100) for row in TABLE if row.model == name}
        assert rows["MCore+folding"] >= rows["MCore"]
    gains = [row.modelled(H100) for row in FP8]
    assert gains[1] > gains[0]


def test_the_mean_error_of_utilisation_is_within_five_percent() -> None:
    found = report(ROWS, H100)
    assert len(found.errors) == 20
    assert found.mean_error < 0.05
    assert max(map(abs, found.errors)) < 0.15


@lru_cache(maxsize=1)
def left_out():
    return held_out(ROWS, H100)


def test_models_that_were_left_out_of_the_fit_are_within_ten_percent() -> None:
    errors = [abs(error) for one in left_out().values() for error in one.errors]
    assert len(errors) == 20
    assert sum(errors) / len(errors) < 0.06
    assert all(one.mean_error < 0.10 for one in left_out().values())


def test_the_shipped_constants_are_those_of_the_fit() -> None:
    fitted = fit(ROWS, H100)
    for free in FREE:
        assert getattr(H100, free.name) == pytest.approx(getattr(fitted, free.name), rel=0.02)


def test_fp8_gains_as_published() -> None:
    bf16 = {row.method: row.modelled(H100) for row in TABLE if row.model == "mixtral-8x22b"}
    ratios = {row.method: row.modelled(H100) / bf16[row.method] for row in FP8}
    assert ratios["MCore"] == pytest.approx(1.26, rel=0.05)
    assert ratios["MCore+folding"] == pytest.approx(1.30, rel=0.05)


def test_utilisation_falls_with_more_ranks_at_a_fixed_batch() -> None:
    found = [plan("mixtral-8x22b", Folding(world=w, tp=2, pp=8, ep=8), global_batch=1024).mfu for w in (128, 256, 512)]
    assert found == sorted(found, reverse=True)


def test_fine_experts_are_slower_than_coarse_ones_of_the_same_size() -> None:
    folding = Folding(world=128, tp=2, pp=8, ep=8)
    coarse, fine = (plan(name, folding, global_batch=256).mfu for name in ("mixtral-8x22b", "mixtral-8x22b-g8t8"))
    assert fine < coarse


# -- what a step is made of -----------------------------------------------------------------------------------------------


def test_parts_sum_to_the_step_and_every_part_counts() -> None:
    step = plan("qwen2-57b-a14b", Folding(world=64, tp=2, cp=2, pp=4, ep=4, etp=2), global_batch=256)
    assert step.seconds == pytest.approx(sum(step.parts.values()))
    assert all(seconds >= 0 for seconds in step.parts.values())
    assert {"experts", "expert exchange", "expert tensor exchange", "pipeline bubble"} <= set(step.parts)
    flops = 256 * 4096 * step.model.flops_per_token()
    assert step.tflops * 1e12 * step.seconds * 64 == pytest.approx(flops)
    assert "modelled" in step.table() and "fits" in step.table()


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral-8x22b", 141, 39),
        ("mixtral-8x7b", 46.7, 12.9),
        ("llama3-8x70b", 465, 126),
        ("qwen2-57b-a14b", 57.4, 14.2),
        ("qwen3-30b-a3b", 30.5, 3.3),
        ("qwen3-235b-a22b", 235, 22),
        ("deepseek-v3", 671, 37.5),
    ],
)
def test_parameters_are_those_of_the_model_cards(name: str, total: float, active: float) -> None:
    assert model(name).parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert model(name).active_parameters / 1e9 == pytest.approx(active, rel=0.02)


def test_experts_that_are_cut_finer_hold_the_same_parameters() -> None:
    coarse, fine = MODELS["mixtral-8x22b"], MODELS["mixtral-8x22b-g8t8"]
    assert fine.num_experts * fine.expert_parameters == coarse.num_experts * coarse.expert_parameters


def test_flops_are_six_a_parameter_and_attention() -> None:
    m = ModelConfig(layers=3, hidden=8, heads=2, num_experts=4, topk=2, expert_ffn=16, vocab=10, sequence=6)
    matrices = 3 * (4 * 8 * 8 + 2 * 3 * 8 * 16 + 8 * 4) + 10 * 8
    pairs = 3 * 2 * (4 + 4) * 6
    assert m.flops_per_token(causal=False) == 6 * matrices + 6 * pairs
    assert m.flops_per_token() == 6 * matrices + 3 * pairs


# -- what must not make a step slower -------------------------------------------------------------------------------------

FOLDINGS = [
    Folding(world=64, tp=2, pp=4, ep=4, etp=1),
    Folding(world=64, tp=4, cp=2, pp=2, ep=16, etp=1),
    Folding(world=64, tp=2, pp=2, ep=8, etp=2),
    Folding(world=64, tp=1, cp=4, pp=1, ep=32),
]
LARGER_IS_FASTER = (
    "bf16_tflops",
    "gemm_bf16",
    "memory_gib",
    "memory_gbytes_per_s",
    "inside_gbytes_per_s",
    "between_gbytes_per_s",
    "attention_forward",
    "attention_backward",
)
LARGER_IS_SLOWER = ("moe_layer_us", "permute_passes", "inside_latency_us", "between_latency_us", "gemm_half_depth")


@given(
    st.sampled_from(FOLDINGS),
    st.sampled_from((*LARGER_IS_FASTER, *LARGER_IS_SLOWER)),
    st.floats(1.01, 1.3),
    st.sampled_from(("optimizer", "parameters")),
)
def test_a_better_machine_is_never_slower(folding: Folding, name: str, factor: float, sharding: str) -> None:
    job = Job(global_batch=256, sharding=sharding)
    better = factor if name in LARGER_IS_FASTER else 1 / factor
    value = getattr(H100, name) * better
    changed = H100.but(**{name: min(value, 1.0) if name.startswith(("gemm_b", "attention_")) else value})
    before, after = plan("qwen2-57b-a14b", folding, job), plan("qwen2-57b-a14b", folding, job, changed)
    assert after.seconds <= before.seconds * (1 + 1e-12)


@given(st.sampled_from(FOLDINGS), st.integers(1, 4), st.sampled_from(("alltoall", "dedup")))
def test_more_work_is_never_faster(folding: Folding, more: int, dispatcher: str) -> None:
    few = plan("qwen2-57b-a14b", folding, global_batch=256, dispatcher=dispatcher)
    assert plan("qwen2-57b-a14b", folding, few.job.but(global_batch=256 * (1 + more))).seconds > few.seconds
    assert plan("qwen2-57b-a14b", folding, few.job.but(imbalance=1 + more / 10)).seconds >= few.seconds
    assert plan(model("qwen2-57b-a14b").at(4096 * (1 + more)), folding, few.job).seconds > few.seconds


@pytest.mark.parametrize("folding", FOLDINGS)
def test_dedup_is_never_slower_than_a_copy_per_expert(folding: Folding) -> None:
    copies = plan("qwen2-57b-a14b", folding, global_batch=256)
    once = plan("qwen2-57b-a14b", folding, global_batch=256, dispatcher="dedup")
    assert once.parts["expert exchange"] < copies.parts["expert exchange"]
    assert once.seconds <= copies.seconds


def test_recomputation_trades_time_for_memory() -> None:
    folding = Folding(world=128, tp=2, pp=8, ep=8)
    none, moe, full = (plan("mixtral-8x22b", folding, global_batch=256, recompute=r) for r in ("none", "moe", "full"))
    assert none.seconds < moe.seconds < full.seconds
    assert none.memory.activations > moe.memory.activations > full.memory.activations
    small = plan("mixtral-8x22b", folding, global_batch=256, hardware=H100.but(memory_gib=60))
    assert small.fits and 0 < small.again < 7
    assert none.seconds < small.seconds < full.seconds


def test_interleaving_divides_the_bubble() -> None:
    folding = Folding(world=128, tp=2, pp=8, ep=8)
    one, seven = (plan("mixtral-8x22b", folding, global_batch=256, interleave=v, recompute="none") for v in (1, 7))
    hops = seven.parts["pipeline bubble"] * 7 - one.parts["pipeline bubble"]
    assert one.parts["pipeline bubble"] > 6 * seven.parts["pipeline bubble"]
    assert hops < 0.1 * one.parts["pipeline bubble"]
    assert seven.memory.activations > one.memory.activations


# -- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"global_batch": 100}, "no multiple of micro_batch x dp"),
        ({}, "give global_batch="),
        ({"global_batch": 256, "batch": 3}, "a Job has no batch"),
        ({"global_batch": 256, "precision": "fp4"}, "precision='fp4'"),
        ({"global_batch": 256, "interleave": 5}, "interleave=5 does not fit"),
        ({"global_batch": 256, "mapping": "nested"}, "give etp=2"),
        ({"global_batch": 256, "imbalance": 0.5}, "imbalance=0.5"),
        ({"global_batch": 0}, "global_batch=0"),
        ({"global_batch": 256, "model": "gpt-5"}, "no model 'gpt-5'"),
        ({"global_batch": 256, "hardware": "abacus"}, "no hardware 'abacus'"),
    ],
)
def test_wrong_questions_are_named(given: dict, words: str) -> None:
    given = {"model": "mixtral-8x22b", "folding": Folding(world=128, tp=2, pp=8, ep=8)} | given
    with pytest.raises(ValueError, match=words):
        plan(given.pop("model"), given.pop("folding"), **given)


def test_a_model_that_a_folding_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="ep divides num_experts"):
        plan("mixtral-8x22b", Folding(world=128, ep=16), global_batch=256)
    with pytest.raises(ValueError, match="pp=64 is more than layers=56"):
        plan("mixtral-8x22b", Folding(world=64, pp=64), global_batch=256)
    with pytest.raises(ValueError, match="equal parts of nodes"):
        plan("qwen2-57b-a14b", Folding(world=64, tp=2, etp=2, ep=4), H100_JOB, H100.but(ranks_per_node=5))


H100_JOB = Job(global_batch=256, dispatcher="hierarchical")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"layers": 0}, "layers=0"),
        ({"kv_heads": 3}, "no multiple of kv_heads=3"),
        ({"topk": 9}, "topk=9"),
        ({"dense_layers": 1}, "needs dense_ffn"),
        ({"q_rank": 4}, "give kv_rank"),
    ],
)
def test_wrong_sizes_are_named(sizes: dict, words: str) -> None:
    given = {"layers": 2, "hidden": 8, "heads": 4, "num_experts": 8, "topk": 2, "expert_ffn": 16, "vocab": 10} | sizes
    with pytest.raises(ValueError, match=words):
        ModelConfig(**given)


def test_a_machine_is_read_from_a_file_and_checked(tmp_path) -> None:
    assert shipped() == ["h100"]
    held = {name: value for name, value in vars(H100).items() if name != "sources"}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(held | {"name": "mine"}))
    assert Hardware.load(path).between_rate == H100.between_rate
    for change, words in (
        ({"gemm_bf16": 1.2}, "it is a share"),
        ({"memory_gib": 0}, "above 0"),
        ({"ranks_per_node": 7.5}, "whole number"),
        ({"colour": 1}, "unknown \\['colour'\\]"),
    ):
        bad = tmp_path / f"{next(iter(change))}.json"
        bad.write_text(json.dumps(held | change))
        with pytest.raises(ValueError, match=words):
            Hardware.load(bad)
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        Hardware.load(tmp_path / "text.json")

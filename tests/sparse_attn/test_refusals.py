"""Bad input: a ValueError that says what was given, what is allowed and how to mend it."""

from __future__ import annotations

import math

import pytest
import torch

import tokenring as tr
from sparse_attn import (
    AnchorConfig,
    TunedConfig,
    anchor_attention,
    baselines,
    compare_logits,
    execute,
    output_error,
    output_recall,
    plan,
    theta_for_density,
    tune,
)
from sparse_attn.maps import stripe_map
from tests.oracle import random_qkv


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"theta": math.nan}, "theta"),
        ({"theta": (1.0, math.nan)}, "theta"),
        ({"theta": ()}, "theta"),
        ({"block": 0}, "block"),
        ({"block": "large"}, "block"),
        ({"step": 2.0}, "step"),
        ({"box": "auto"}, "box"),
        ({"identify": "best"}, "pooled, lse, rescore, every"),
        ({"share": "head"}, "query, key"),
        ({"dense": "always"}, "auto, never"),
        ({"reach": 1.5}, "reach"),
        ({"scores": "fp8"}, "scores"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AnchorConfig(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask": "full"}, "causal"),
        ({"mask": torch.ones(3, 3)}, "causal"),
        ({"mask": tr.Mask.window(8)}, "not honoured"),
        ({"mask": tr.Mask.spans([(0, 4)])}, "not honoured"),
        ({"mask": tr.Mask.documents([0, 20, 60], causal=False)}, "not honoured"),
        ({"mask": tr.Mask.documents([0, 60]), "cu_seqlens": [0, 60]}, "give one"),
        ({"cu_seqlens": [0, 50]}, "rise from 0 to the 60 rows"),
        ({"cu_seqlens": [0, 40, 30, 60]}, "rise"),
        ({"kv_cu_seqlens": [0, 60]}, "without cu_seqlens"),
        ({"cu_seqlens": [0, 60], "kv_cu_seqlens": [0, 20, 60]}, "as many"),
        ({"cu_seqlens": [0, 30, 60], "kv_cu_seqlens": [0, 20, 60]}, "30 queries and 20 keys"),
        ({"keep": [60]}, "rows 0 to 59"),
        ({"keep": [0.5]}, "row numbers"),
        ({"scale": 0.0}, "scale"),
        ({"layout": "striped"}, "without a group"),
        ({"kernel": "warp"}, "warp"),
        ({"config": AnchorConfig(theta=(1.0, 2.0, 3.0))}, "2 heads"),
    ],
)
def test_a_call_that_cannot_be_honoured_is_refused(options: dict, said: str) -> None:
    q, k, v = random_qkv(1, 60, 2, 1, 8, torch.float32)
    with pytest.raises(ValueError, match=said):
        anchor_attention(q, k, v, **options)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[0], k, v),
        lambda q, k, v: (q, k[:, :30], v),
        lambda q, k, v: (q, k[:, :30], v[:, :30]),
        lambda q, k, v: (q[:, :, :1].expand(-1, -1, 3, -1), k.expand(-1, -1, 2, -1), v.expand(-1, -1, 2, -1)),
        lambda q, k, v: (q, k.double(), v),
        lambda q, k, v: (q.int(), k.int(), v.int()),
        lambda q, k, v: (q[..., :4], k, v),
    ],
    ids=["dims", "v rows", "more queries than keys", "heads", "dtypes", "integers", "head dims"],
)
def test_tensors_that_do_not_agree_are_refused(change) -> None:
    with pytest.raises(ValueError, match="got q"):
        anchor_attention(*change(*random_qkv(1, 60, 2, 1, 8, torch.float32)))


def test_a_plan_of_another_shape_or_beside_other_options_is_refused() -> None:
    q, k, v = random_qkv(1, 60, 2, 1, 8, torch.float32)
    found = plan(q, k, config=AnchorConfig(block=8, step=2))
    with pytest.raises(ValueError, match="the plan is for q"):
        execute(found, q[:, :-1], k[:, :-1], v[:, :-1])
    with pytest.raises(ValueError, match="leave them out"):
        anchor_attention(q, k, v, plan=found, config=AnchorConfig())


def test_no_rows_at_all_give_an_empty_result() -> None:
    q, k, v = random_qkv(1, 0, 2, 1, 8, torch.float32, kv_length=20)
    assert anchor_attention(q, k, v).shape == (1, 0, 2, 8)


def test_no_query_row_is_left_without_a_key() -> None:
    q, k, v = random_qkv(1, 200, 2, 1, 16, torch.float32)
    out, lse = anchor_attention(
        q, k, v, config=AnchorConfig(theta=-math.inf, block=8, step=2, dense="never"), return_lse=True
    )
    assert lse.isfinite().all() and (out.abs().sum(-1) > 0).all()


def test_a_group_runs_over_ranks() -> None:
    q, k, v = random_qkv(1, 96, 2, 1, 8, torch.float64)
    config = AnchorConfig(theta=1.0, block=8, step=2, dense="never")
    layout = tr.Layout.zigzag(96, 3)

    def rank(group: object) -> torch.Tensor:
        mine = (layout.shard(x, group.rank()) for x in (q, k, v))
        return anchor_attention(*mine, config=config, group=group, layout=layout)

    whole = anchor_attention(q, k, v, config=config)
    for number, out in enumerate(tr.run_local(3, rank)):
        torch.testing.assert_close(out, layout.shard(whole, number), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cu_seqlens": [0, 20.5, 60]}, "whole numbers"),
        ({"cu_seqlens": torch.tensor([0.0, 60.0])}, "torch.float32"),
        ({"cu_seqlens": torch.tensor([[0, 60]])}, "1-D tensor"),
        ({"cu_seqlens": 60}, "a list"),
        ({"keep": "visual"}, "row numbers"),
        ({"config": {"theta": 1.0}}, "give an AnchorConfig"),
        ({"plan": "dense"}, "sparse_attn.plan"),
        ({"kernel": "triton", "config": AnchorConfig(block=8, step=1, dense="never")}, "needs a GPU"),
    ],
)
def test_values_of_another_kind_are_refused_and_never_rounded(options: dict, said: str) -> None:
    q, k, v = random_qkv(1, 60, 2, 1, 8, torch.float32)
    with pytest.raises(ValueError, match=said):
        anchor_attention(q, k, v, **options)


@pytest.mark.parametrize("name", ["streaming", "vertical_slash", "flexprefill", "xattention", "flashprefill"])
@pytest.mark.parametrize("block", [0, -8, 1.5, True], ids=str)
def test_baselines_refuse_blocks_that_are_no_blocks(name: str, block: object) -> None:
    q, k, _ = random_qkv(1, 60, 2, 1, 8, torch.float32)
    with pytest.raises(ValueError, match="block is"):
        getattr(baselines, name)(q, k, block=block)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("streaming", {"initial": 1.5}),
        ("vertical_slash", {"vertical": 2.5}),
        ("flexprefill", {"tau": math.nan}),
        ("flexprefill", {"min_budget": -4}),
        ("xattention", {"stride": 0}),
        ("flashprefill", {"sink": 1.5}),
    ],
)
def test_baselines_name_the_option_that_means_nothing(name: str, options: dict) -> None:
    q, k, _ = random_qkv(1, 60, 2, 1, 8, torch.float32)
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        getattr(baselines, name)(q, k, **options)


def test_metrics_refuse_shapes_that_would_be_stretched_or_cut() -> None:
    out, logits = torch.randn(1, 6, 2, 4), torch.randn(6, 9)
    for metric in (output_recall, output_error):
        with pytest.raises(ValueError, match="one shape"):
            metric(out, out[:, :, :1])
    with pytest.raises(ValueError, match="ids of one text"):
        compare_logits(logits, logits, torch.arange(5))


def test_masks_of_documents_may_hold_documents_of_one_row_and_of_none() -> None:
    q, k, v = random_qkv(1, 60, 2, 1, 8, torch.float64)
    config = AnchorConfig(theta=1.0, block=4, step=2, dense="never")
    for cuts in ([0, 0, 1, 2, 40, 40, 60], [0, 59, 60]):
        want = anchor_attention(q, k, v, config=config, cu_seqlens=cuts)
        assert torch.equal(anchor_attention(q, k, v, config=config, mask=tr.Mask.documents(cuts)), want)
    rows, keys = [0, 0, 1, 21], [0, 7, 30, 60]
    want = anchor_attention(q[:, :21], k, v, config=config, cu_seqlens=rows, kv_cu_seqlens=keys)
    assert torch.equal(anchor_attention(q[:, :21], k, v, config=config, mask=tr.Mask.documents(rows, keys)), want)


def test_an_empty_list_of_rows_to_keep_keeps_none() -> None:
    q, k, v = random_qkv(1, 60, 2, 1, 8, torch.float64)
    config = AnchorConfig(theta=1.0, block=4, step=2, dense="never")
    want = anchor_attention(q, k, v, config=config)
    assert torch.equal(anchor_attention(q, k, v, config=config, keep=[]), want)


def test_groups_heads_and_entries_that_a_plan_lacks_are_refused() -> None:
    q, k, _ = random_qkv(1, 60, 2, 1, 8, torch.float32)
    found = plan(q, k, config=AnchorConfig(block=8, step=2, dense="never"))
    for ask in (
        lambda: found.columns(99, 0, 0),
        lambda: found.columns(0, 0, -1),
        lambda: found.dense_mask(0, 2),
        lambda: stripe_map(found, -1),
    ):
        with pytest.raises(ValueError, match="the plan has"):
            ask()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"samples": [[(2, 1)], [(4, 1)]]}, "layer 0 has 4 heads in this text and had 2"),
        ({"metric": "loss", "loss": lambda found: math.nan}, "loss gave nan"),
        ({"metric": "loss", "loss": lambda found: 0.0, "target": math.nan}, "finite number"),
    ],
    ids=["heads", "loss", "target"],
)
def test_samples_and_losses_that_mean_nothing_are_refused(change: dict, said: str) -> None:
    config = AnchorConfig(block=8, step=2, dense="never")
    options = {"samples": [[(2, 1)]], "target": 0.5} | change
    samples = [[random_qkv(1, 90, *heads, 8, torch.float32)[:2] for heads in text] for text in options.pop("samples")]
    with pytest.raises(ValueError, match=said):
        tune(samples, config=config, **options)


def test_a_density_needs_a_batch_entry_and_a_number() -> None:
    q, k, _ = random_qkv(1, 60, 2, 1, 8, torch.float32)
    with pytest.raises(ValueError, match="no batch entry"):
        theta_for_density(q[:0], k[:0], 0.5)
    with pytest.raises(ValueError, match="target is 'low'"):
        theta_for_density(q, k, "low")


def test_a_tuned_configuration_has_layers(tmp_path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text('{"format": 1, "layers": {}, "metric": "recall", "target": 0.9, "reached": 1}')
    with pytest.raises(ValueError, match="one layer or more"):
        TunedConfig.load(path)

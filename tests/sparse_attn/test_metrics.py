"""Recall, output recall and logits against the same written out on whole matrices."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sparse_attn import (
    AnchorConfig,
    TunedConfig,
    compare_logits,
    execute,
    mass_recall,
    output_error,
    output_recall,
    plan,
    tune,
)
from tests.oracle import dense_attention, random_qkv

CONFIG = AnchorConfig(theta=1.0, block=8, step=2, dense="never")


def dense_weights(q, k, head: int) -> torch.Tensor:
    scores = q[0, :, head].double() @ k[0, :, head * k.shape[2] // q.shape[2]].double().T * q.shape[-1] ** -0.5
    causal = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
    return scores.masked_fill(~causal, -torch.inf).softmax(-1)


def test_mass_recall_is_the_dense_weight_on_kept_keys() -> None:
    q, k, _ = random_qkv(1, 170, 4, 2, 16, torch.float64)
    found, bare = (plan(q, k, config=AnchorConfig(**{**vars(CONFIG), "theta": t})) for t in (1.0, -math.inf))
    recall = mass_recall(q, k, found)
    for head in range(4):
        weights, kept, near = dense_weights(q, k, head), found.dense_mask(0, head), bare.dense_mask(0, head)
        assert float(recall.heads[0, head]) == pytest.approx(float((weights * kept).sum(-1).mean()), abs=1e-9)
        beyond = float((weights * (kept & ~near)).sum() / (weights * ~near).sum())
        assert float(recall.beyond[0, head]) == pytest.approx(beyond, abs=1e-9)
    assert recall.minimum <= recall.p5 <= recall.mean < 1 and float(recall.beyond.mean()) < recall.mean


def test_lost_mass_bounds_the_output_error() -> None:
    q, k, v = random_qkv(1, 170, 2, 2, 16, torch.float64)
    found = plan(q, k, config=CONFIG)
    out, dense = execute(found, q, k, v), dense_attention(q, k, v, torch.ones(170, 170, dtype=torch.bool).tril())[0]
    for head in range(2):
        lost = 1 - (dense_weights(q, k, head) * found.dense_mask(0, head)).sum(-1)
        error = (out - dense)[0, :, head].norm(dim=-1)
        assert (error <= 2 * lost * v[0, :, head].norm(dim=-1).max() + 1e-12).all()


def test_output_recall_and_error() -> None:
    dense = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert output_recall(dense + torch.tensor([[0.0, 0.005], [0.02, 0.5]]), dense) == 0.5
    assert output_recall(dense + 0.02, dense, tolerance=0.05) == 1.0
    error = output_error(dense * 1.1, dense)
    assert error["relative"] == pytest.approx(0.1, rel=1e-5) and error["cosine"] == pytest.approx(1.0)


def test_logits_are_compared_position_by_position() -> None:
    make = torch.Generator().manual_seed(0)
    mine, dense = (torch.randn(700, 11, generator=make, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, 11, (700,), generator=make)
    found = compare_logits(mine, dense, ids)
    loss = torch.nn.functional.cross_entropy
    expected = float(loss(mine[:-1], ids[1:]) - loss(dense[:-1], ids[1:]))
    p, log_q = dense[:-1].softmax(-1), mine[:-1].log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, p, reduction="batchmean")
    assert found.nll == pytest.approx(expected) and found.kl == pytest.approx(float(kl))
    assert found.top1 == pytest.approx(float((mine[:-1].argmax(-1) == dense[:-1].argmax(-1)).double().mean()))


@pytest.mark.parametrize("method", ["pooled", "lse", "rescore"])
def test_tuned_thetas_reach_the_target_and_not_much_more(method: str, tmp_path: Path) -> None:
    samples = [
        {
            2: random_qkv(1, 260, 4, 2, 16, torch.float32, seed=s)[:2],
            5: random_qkv(1, 260, 4, 2, 16, torch.float32, seed=s + 9)[:2],
        }
        for s in (0, 1)
    ]
    config = AnchorConfig(identify=method, block=8, step=4, dense="never")
    tuned = tune(samples, target=0.85, config=config, steps=9)
    for number in (2, 5):
        heads = torch.stack(
            [mass_recall(*s[number], plan(*s[number], config=tuned.layer(number))).heads[0] for s in samples]
        )
        assert (heads.mean(0) >= 0.85 - 1e-4).all() and heads.mean() < 0.93
    tuned.save(tmp_path / "thetas.json")
    assert TunedConfig.load(tmp_path / "thetas.json") == tuned
    assert tuned.layer(0) == tuned.layers[2] and tuned.layer(99) == tuned.layers[5]


def test_a_loss_is_met_with_the_least_recall() -> None:
    samples = [[random_qkv(1, 200, 2, 1, 16, torch.float32)[:2]]]
    seen = []

    def loss(found: TunedConfig) -> float:
        seen.append(1 - found.reached)
        return seen[-1]

    tuned = tune(samples, target=0.2, metric="loss", loss=loss, config=CONFIG, steps=5)
    assert tuned.metric == "loss" and tuned.reached <= 0.2
    assert max(x for x in seen if x <= 0.2) == tuned.reached


def test_infinite_thetas_survive_json(tmp_path: Path) -> None:
    tuned = TunedConfig({0: AnchorConfig(theta=(math.inf, -math.inf, 2.5))}, "recall", 0.9, 0.95)
    tuned.save(tmp_path / "t.json")
    assert TunedConfig.load(tmp_path / "t.json") == tuned


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": 0.9, "metric": "speed"}, "metric"),
        ({"target": 0.9, "metric": "loss"}, "loss"),
        ({"target": 1.5}, "between 0 and 1"),
    ],
)
def test_tuning_refuses_what_it_cannot_reach(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tune([[random_qkv(1, 20, 1, 1, 8, torch.float32)[:2]]], **options)
    with pytest.raises(ValueError, match="no layers"):
        tune([], target=0.9)


def test_a_file_that_is_no_tuned_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"format": 7}')
    with pytest.raises(ValueError, match=r"sparse_attn\.tune"):
        TunedConfig.load(tmp_path / "t.json")


def test_stripe_maps_show_the_pairs(tmp_path: Path) -> None:
    from sparse_attn.maps import save_stripe_maps, stripe_map

    q, k, _ = random_qkv(1, 120, 2, 1, 16, torch.float32)
    for share in ("query", "key"):
        found = plan(q, k, config=AnchorConfig(**{**vars(CONFIG), "share": share}))
        assert torch.equal(torch.from_numpy(stripe_map(found, 1)).bool(), found.dense_mask(0, 1))
    assert save_stripe_maps(found, tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")

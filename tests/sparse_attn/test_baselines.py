"""The baselines: what each is described to keep, on inputs where that is known, and exact attention over their plans."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sparse_attn import baselines, execute, mass_recall, reference_attention
from tests.oracle import random_qkv

SMALL: dict[str, dict] = {
    "streaming": {"initial": 16, "local": 40, "block": 16},
    "vertical_slash": {"vertical": 60, "slash": 60, "block": 16},
    "flexprefill": {"gamma": 0.6, "min_budget": 16, "block": 16},
    "xattention": {"threshold": 0.6, "block": 16, "stride": 4},
    "flashprefill": {"alpha": 0.97, "sink": 1, "window": 2, "last": 1, "block": 16},
}
ALL: dict[str, dict] = {
    "streaming": {"initial": 0, "local": 1000},
    "vertical_slash": {"vertical": 1000, "slash": 1000},
    "flexprefill": {"gamma": 1.0, "min_budget": 1000},
    "xattention": {"threshold": 1.0, "block": 16},
    "flashprefill": {"alpha": 0.0, "block": 16},
}


def method(name: str) -> Callable:
    return getattr(baselines, name)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("length", [1, 15, 16, 203])
def test_attention_over_a_baselines_plan_is_exact(name: str, length: int) -> None:
    q, k, v = random_qkv(2, length, 4, 2, 16, torch.float64, seed=length)
    found = method(name)(q, k, **SMALL[name])
    out, lse = execute(found, q, k, v, return_lse=True)
    expected, expected_lse = reference_attention(found, q, k, v)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)
    assert found.density < 1 or length < 203


@pytest.mark.parametrize("name", ALL)
def test_the_loosest_setting_keeps_everything(name: str) -> None:
    q, k, _ = random_qkv(1, 203, 2, 1, 16, torch.float64)
    found = method(name)(q, k, **ALL[name])
    assert found.density == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_grouped_heads_choose_as_repeated_ones_do(name: str) -> None:
    q, k, _ = random_qkv(2, 130, 4, 2, 16, torch.float64)
    grouped = method(name)(q, k, **SMALL[name])
    repeated = method(name)(q, k.repeat_interleave(2, 2), **SMALL[name])
    assert torch.equal(grouped.indptr, repeated.indptr) and torch.equal(grouped.indices, repeated.indices)


def test_streaming_is_the_a_shape() -> None:
    q, k, _ = random_qkv(1, 200, 1, 1, 8, torch.float32)
    mask = baselines.streaming(q, k, initial=16, local=40, block=8).dense_mask(0, 0)
    difference = torch.arange(200)[:, None] - torch.arange(200)[None, :]
    exact = (difference >= 0) & ((difference < 40) | (torch.arange(200) < 16))
    assert (mask | ~exact).all() and not (mask & (difference >= 48) & (torch.arange(200) >= 16)).any()


def planted(length: int, columns: list[int], distance: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries that all want some columns, or the key a fixed distance back."""
    make = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, length, 1, 32, generator=make) * 0.1 for _ in range(2))
    if distance is None:
        wanted = torch.randn(32, generator=make)
        q[:] += wanted
        k[:, columns] += 3 * wanted
    else:
        names = torch.randn(1, length, 1, 32, generator=make) * 1.5
        k += names
        q[:, distance:] += names[:, : length - distance]
    return q, k


@pytest.mark.parametrize("name", ["vertical_slash", "flexprefill"])
def test_columns_that_all_want_are_found(name: str) -> None:
    q, k = planted(256, [77, 140])
    options = {
        "vertical_slash": {"vertical": 40, "slash": 110, "block": 16},
        "flexprefill": SMALL["flexprefill"] | {"tau": 0.0},
    }
    found = method(name)(q, k, **options[name])
    for group in range(10, 16):
        assert {77, 140} <= set(found.columns(group, 0, 0).tolist())
    assert mass_recall(q, k, found).mean > (0.95 if name == "vertical_slash" else 0.6)


def test_a_diagonal_is_found_by_vertical_slash() -> None:
    q, k = planted(512, [], distance=170)
    found = baselines.vertical_slash(q, k, vertical=40, slash=105, block=16)
    assert mass_recall(q, k, found).mean > 0.9 and found.density < 0.75
    rows = torch.arange(200, 512)
    assert found.dense_mask(0, 0)[rows, rows - 170].all()


@pytest.mark.parametrize("name", ["xattention", "flashprefill", "flexprefill"])
def test_a_heavy_block_is_found(name: str) -> None:
    q, k = planted(256, list(range(64, 80)))
    options = SMALL[name] | ({"tau": 1.0} if name == "flexprefill" else {})
    found = method(name)(q, k, **options)
    for group in range(8, 16):
        assert set(range(64, 80)) <= set(found.columns(group, 0, 0).tolist())
    assert found.density < 0.5


def test_flexprefill_says_which_pattern_each_head_took() -> None:
    q, k, _ = random_qkv(1, 200, 2, 1, 16, torch.float32)
    assert "query-aware in 2 of 2" in baselines.flexprefill(q, k, tau=1.0, block=16).why
    assert "query-aware in 0 of 2" in baselines.flexprefill(q, k, tau=0.0, block=16).why


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("streaming", {"local": -1}),
        ("streaming", {"block": 0}),
        ("vertical_slash", {"slash": 0}),
        ("flexprefill", {"gamma": 1.5}),
        ("xattention", {"stride": 7}),
        ("xattention", {"threshold": -0.1}),
        ("flashprefill", {"alpha": 2.0}),
        ("flashprefill", {"last": -1}),
    ],
)
def test_settings_that_mean_nothing_are_refused(name: str, options: dict) -> None:
    q, k, _ = random_qkv(1, 64, 1, 1, 8, torch.float32)
    with pytest.raises(ValueError, match=next(iter(options))):
        method(name)(q, k, **options)


@pytest.mark.parametrize("name", SMALL)
def test_part_of_a_sequence_is_refused(name: str) -> None:
    q, k, _ = random_qkv(1, 64, 1, 1, 8, torch.float32)
    with pytest.raises(ValueError, match="whole sequence"):
        method(name)(q[:, 32:], k)

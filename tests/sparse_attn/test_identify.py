"""Which columns are kept: against tests written out by brute force."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_attn import AnchorConfig, StripePlan, plan
from sparse_attn.identify.ahead import reaching
from sparse_attn.identify.products import parted, reached, reached_early
from tests.oracle import random_qkv

BLOCK, STEP = 8, 4
METHODS = ("pooled", "lse", "rescore", "every")


def config(theta: float, method: str, **options) -> AnchorConfig:
    return AnchorConfig(
        **{"theta": theta, "block": BLOCK, "step": STEP, "identify": method, "dense": "never", **options}
    )


def brute_force(q, k, theta: float, method: str, head: int) -> dict[int, set[int]]:
    """The paper's definition in loops, for one batch entry, float64; {group: columns}."""
    length, rows = q.shape[1], BLOCK * STEP
    scores = (q[0, :, head] @ k[0, :, head * k.shape[2] // q.shape[2]].T) * q.shape[-1] ** -0.5
    kept = {}
    for number, start in enumerate(range(0, length, rows)):
        candidates = range(BLOCK, start - BLOCK)
        region = lambda i, start=start: [*range(min(BLOCK, i + 1)), *range(max(start - BLOCK, BLOCK), i + 1)]  # noqa: E731
        stop, found = min(start + rows, length), set()
        for first in range(start, stop, BLOCK):
            block = range(first, min(first + BLOCK, stop))
            maximum = torch.stack([scores[i, region(i)].max() for i in block])
            lse = torch.stack([scores[i, region(i)].logsumexp(0) for i in block])
            for j in candidates:
                column = scores[list(block), j]
                margin = {
                    "pooled": column.mean() - maximum.mean(),
                    "lse": column.mean() - lse.mean(),
                    "every": (column - lse).max(),
                }[method]
                if margin >= -theta:
                    found.add(j)
        kept[number] = found
    return kept


def as_sets(found: StripePlan, head: int) -> dict[int, set[int]]:
    return {g: set(found.columns(g, 0, head).tolist()) for g in range(len(found.geometry.groups))}


@pytest.mark.parametrize("method", ["pooled", "lse", "every"])
@pytest.mark.parametrize("length", [130, 203])
@pytest.mark.parametrize("theta", [1.0, 2.5])
def test_the_kept_columns_are_those_of_the_definition(method: str, length: int, theta: float) -> None:
    q, k, _ = random_qkv(1, length, 4, 2, 16, torch.float64, seed=length)
    theta += 1.5 * (method == "lse")
    found = plan(q, k, config=config(theta, method))
    for head in range(4):
        assert as_sets(found, head) == brute_force(q, k, theta, method, head)
    assert 0 < found.stripe_density < 1


@pytest.mark.parametrize("theta", [0.0, 1.0, 2.0])
def test_a_true_bound_loses_nothing(theta: float) -> None:
    q, k, _ = random_qkv(1, 205, 4, 2, 16, torch.float64)
    every = plan(q, k, config=config(theta, "every"))
    rescored = plan(q, k, config=config(theta, "rescore", reach=1.0))
    assert torch.equal(every.indptr, rescored.indptr) and torch.equal(every.indices, rescored.indices)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_larger_theta_keeps_a_superset(method: str, dtype: torch.dtype) -> None:
    q, k, _ = random_qkv(1, 205, 4, 2, 16, dtype)
    before = None
    for theta in (-math.inf, -1.0, 0.0, 1.0, 2.5, 6.0, 1e9):
        now = as_sets(plan(q, k, config=config(theta, method)), 1)
        if before is not None:
            assert all(before[g] <= now[g] for g in now)
        before = now
    assert before[6] == set(range(BLOCK, 192 - BLOCK))


@pytest.mark.parametrize("method", METHODS)
def test_one_huge_key_for_a_single_query_is_found_by_rescore_and_every(method: str) -> None:
    q, k, _ = random_qkv(1, 256, 1, 1, 32, torch.float32)
    q, k = q * 0.3, k * 0.3
    direction = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(5)), dim=0)
    # The query's neighbours look away from the key, so that their mean does too.
    q[0, 192:224, 0] -= 6 * direction
    q[0, 195, 0] = 6 * direction
    k[0, 77, 0] = 12 * direction
    found = 77 in plan(q, k, config=config(2.0, method)).columns(6, 0, 0).tolist()
    assert found == (method in ("rescore", "every"))


@pytest.mark.parametrize("last", [5, 13])
def test_what_the_last_rows_want_is_kept_however_rough_the_bound(last: int) -> None:
    length, rows = 205, BLOCK * STEP
    q, k, _ = random_qkv(1, length, 1, 1, 16, torch.float64)
    scores = (q[0, :, 0] @ k[0, :, 0].T) * 0.25
    kept, rough = (as_sets(plan(q, k, config=config(0.5, "rescore", reach=0.0, last=n)), 0) for n in (last, 0))
    wanted: dict[int, set[int]] = {}
    for i in range(length - last, length):
        start = i - i % rows
        lse = scores[i, [*range(BLOCK), *range(start - BLOCK, i + 1)]].logsumexp(0)
        own = {j for j in range(BLOCK, start - BLOCK) if scores[i, j] >= lse - 0.5}
        wanted[start // rows] = wanted.get(start // rows, set()) | own
    for group, columns in wanted.items():
        assert columns <= kept[group] and not columns <= rough[group]
    assert all(kept[group] == rough[group] for group in kept if group not in wanted)


def test_sharing_by_key_head_is_the_union_of_its_query_heads() -> None:
    q, k, _ = random_qkv(2, 205, 6, 2, 16, torch.float64)
    alone, shared = (plan(q, k, config=config(3.5, "lse", share=share)) for share in ("query", "key"))
    for entry in range(2):
        for group in range(len(alone.geometry.groups)):
            for key_head in range(2):
                union = set().union(*(alone.columns(group, entry, key_head * 3 + h).tolist() for h in range(3)))
                assert set(shared.columns(group, entry, key_head).tolist()) == union


def test_heads_have_thetas_of_their_own() -> None:
    q, k, _ = random_qkv(1, 205, 2, 1, 16, torch.float64)
    both = plan(q, k, config=config((0.5, 3.0), "rescore"))
    for head, theta in enumerate((0.5, 3.0)):
        assert as_sets(both, head) == as_sets(plan(q, k, config=config(theta, "rescore")), head)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_head_may_keep_all_or_nothing(method: str, dtype: torch.dtype) -> None:
    q, k, _ = random_qkv(1, 205, 2, 1, 16, dtype)
    both = plan(q, k, config=config((math.inf, -math.inf), method))
    for number, group in enumerate(both.geometry.groups):
        assert both.columns(number, 0, 0).tolist() == list(range(*group.candidates))
        assert both.columns(number, 0, 1).tolist() == []


@pytest.mark.parametrize("columns", [1, 300, 1500])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_rows_that_ask_first_change_nothing(dtype: torch.dtype, columns: int) -> None:
    make = torch.Generator().manual_seed(0)
    rows, keys = (torch.randn(n, 12, generator=make, dtype=torch.float64).to(dtype) for n in (45, columns))
    rows[:, -1], keys[:, -1] = -9.0, 1.0
    found = reached_early(parted(rows), keys)
    assert torch.equal(found, (rows.double() @ keys.double().T >= 0).any(0))
    assert columns == 1 or 0.1 < found.double().mean() < 0.9
    assert torch.equal(found, reached(rows[None], keys)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_groups_in_one_pass_find_what_each_asks_about(dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(0)
    counts = [90, 1030, 1500]
    rows = torch.randn(6, len(counts), 5, 12, generator=make, dtype=torch.float64).to(dtype)
    keys = torch.randn(counts[-1], 2, 12, generator=make, dtype=torch.float64).to(dtype)
    rows[..., -1], keys[..., -1] = -5.0, 1.0
    found = reaching(rows, None, keys, counts)
    for head in range(6):
        right = (rows[head].double() @ keys[:, head // 3].double().T >= 0).any(1)
        assert 0.1 < right.double().mean() < 0.9
        for number, count in enumerate(counts):
            assert torch.equal(found[head, number, :count], right[number, :count])


def test_columns_ascend_and_precede_their_group() -> None:
    q, k, _ = random_qkv(1, 300, 2, 1, 16, torch.float32)
    found = plan(q, k, config=config(2.0, "every"))
    for number, group in enumerate(found.geometry.groups):
        columns = found.columns(number, 0, 1)
        assert (columns.diff() > 0).all()
        if len(columns):
            assert group.candidates[0] <= int(columns[0]) and int(columns[-1]) < group.candidates[1]


@pytest.mark.parametrize("method, theta", [("every", 1.5), ("rescore", 1.5), ("pooled", 1.5), ("lse", 3.3)])
def test_tests_in_bfloat16_choose_nearly_the_same_columns(method: str, theta: float) -> None:
    q, k, _ = random_qkv(1, 400, 2, 1, 64, torch.float32)
    exact, rough = (plan(q, k, config=config(theta, method, scores=name)) for name in ("input", "auto"))
    assert 0.1 < exact.stripe_density < 0.9
    for number in range(len(exact.geometry.groups)):
        a, b = (set(x.columns(number, 0, 0).tolist()) for x in (exact, rough))
        assert len(a ^ b) <= max(1, 0.05 * len(a))


def test_the_papers_setting() -> None:
    paper = AnchorConfig.paper()
    assert (paper.theta, paper.block, paper.step, paper.identify, paper.share) == (12.0, 128, 16, "pooled", "query")

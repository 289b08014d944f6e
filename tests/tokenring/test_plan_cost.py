"""Plans stay cheap: what is looked up for every layer is found by identity, and a thousand ranks cost one rank little."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time

import pytest
import torch

import tokenring as tr


def plan_of(schedule: str, mask: str) -> tr.Plan:
    return tr.plan(schedule, world=4, shape=tr.AttentionShape(2, 64, 64, 8, 2, 16), layout="zigzag", mask=mask)


def test_equal_arguments_find_the_same_objects_however_they_are_spelled() -> None:
    """What every layer of a model looks up is found by identity, not by comparing thousands of runs and cells."""
    assert tr.Layout.zigzag(64, 4) is tr.Layout.zigzag(64, 4) is tr.Layout.of("zigzag", 16, 4)
    assert tr.Layout.zigzag(64, 4).at(8) is tr.Layout.zigzag(64, 4).at(8)
    assert tr.Mask.documents([0, 4, 64]) is tr.Mask.documents(torch.tensor([0, 4, 64]))
    assert plan_of("ring", "causal") is plan_of("ring", "causal")


def test_parts_of_plans_keep_their_hash_across_processes() -> None:
    """A hash of text or None differs between processes; a copy that came from another one is found all the same."""
    code = (
        "import pickle, sys, tokenring as tr; "
        "shape = tr.AttentionShape(1, 8, 8, 2, 1, 4); mask = tr.Mask.documents([0, 3, 8]) & tr.Mask.window(2); "
        "plan = tr.plan('ring', world=2, shape=shape, layout='zigzag', mask=mask); "
        "sys.stdout.buffer.write(pickle.dumps((plan.problem, plan.problem.q_layout, plan.problem.mask)))"
    )
    there = pickle.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    mask = tr.Mask.documents([0, 3, 8]) & tr.Mask.window(2)
    shape = tr.AttentionShape(1, 8, 8, 2, 1, 4)
    problem = tr.plan("ring", world=2, shape=shape, layout="zigzag", mask=mask).problem
    for mine, theirs in zip((problem, problem.q_layout, problem.mask), there):
        assert mine == theirs and hash(mine) == hash(theirs)


def thousand(schedule: str, layout: str, mask: tr.Mask) -> tr.Plan:
    length = 1024 * 4096
    shape = tr.AttentionShape(1, length, length, 128, 8, 128)
    return tr.plan(schedule, world=1024, shape=shape, layout=layout, mask=mask)


LONG_WINDOW = tr.Mask.window(4096)
DOCUMENTS = tr.Mask.documents([0, *range(500, 1024 * 4096, 839), 1024 * 4096])


@pytest.mark.parametrize(
    "schedule",
    ["ring", "biring", "tokenring", "gather", "mesh:32x32", "ulysses", "usp:8x128", "hybrid:ring/tokenring@8"],
)
@pytest.mark.parametrize("mask", [LONG_WINDOW, DOCUMENTS], ids=["window", "documents"])
def test_one_of_a_thousand_ranks_is_planned_in_linear_time(schedule: str, mask: tr.Mask) -> None:
    """Pairs of ranks are a million: looking at each would take ten times what is allowed here."""
    start = time.process_time()
    plan = thousand(schedule, "zigzag", mask)
    assert plan.bytes_sent(511) > 0 and plan.operations(511)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("schedule", ["ulysses", "usp:8x8", "gather"])
def test_proving_costs_no_more_than_a_few_times_building(schedule: str) -> None:
    """Every rank of a Ulysses group holds the rows of all: 64 ranks have 128 runs a side, a quarter of a million rectangles."""
    length = 64 * 4096
    shape = tr.AttentionShape(1, length, length, 64, 8, 128)
    plan = tr.plan(schedule, world=64, shape=shape, layout="zigzag", mask="causal")
    start = time.process_time()
    assert plan.check().pairs == length * (length + 1) // 2
    assert time.process_time() - start < 6


def test_explaining_a_plan_adds_up_each_message_once() -> None:
    plan = plan_of("gather", "full")
    lines = plan.explain().splitlines()[2:]
    for rank, line in enumerate(lines):
        assert f"{plan.bytes_sent(rank):>12}" in line
        assert all(f"{peer}: {plan.bytes_sent(rank, peer)}" in line for peer in range(4) if peer != rank)

"""Plans stay cheap: what is looked up for every layer is found by identity, and a thousand ranks cost one rank little."""

from __future__ import annotations

import pickle
import subprocess
import sys

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

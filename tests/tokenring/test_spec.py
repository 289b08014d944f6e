"""What is written as text reads back equal, in this process or another."""

from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenring as tr
from tests.tokenring.every_schedule import layouts, masks, schedule_names
from tokenring.plans.spec import layout_of, mask_of, plan_of, plan_of_tensor, plan_tensor, to_text, topology_of
from tokenring.segments import Segment
from tokenring.topology import Topology


def read(text: str, kind: type) -> Any:
    reader = {tr.Layout: layout_of, tr.Mask: mask_of, tr.Plan: plan_of, Topology: topology_of}[kind]
    return reader(json.loads(text))


@given(
    name=st.sampled_from(("contiguous", "zigzag", "striped")),
    length=st.integers(0, 40),
    world=st.integers(1, 7),
    offset=st.integers(0, 9),
)
def test_every_layout_reads_back(name: str, length: int, world: int, offset: int) -> None:
    layout = getattr(tr.Layout, name)(length, world, offset)
    text = to_text(layout)
    assert read(text, tr.Layout) == layout and "runs" not in text


def test_layouts_that_no_name_makes_read_back_with_their_runs() -> None:
    dealt = tr.Layout.from_runs([[Segment(0, 2), Segment(5, 1)], [Segment(2, 3)]])
    misnamed = replace(dealt, name="zigzag")
    for layout in (dealt, misnamed, dealt.at(4), tr.Layout.striped(23, 3, 2, block=4), *layouts(29, 3)):
        assert read(to_text(layout), tr.Layout) == layout
    assert read(to_text(misnamed), tr.Layout).positions(0).tolist() == [0, 1, 5]


def test_every_mask_reads_back() -> None:
    kinds = masks(29, 3) | {
        "nothing": tr.Mask.lengths([0, 0, 0]),
        "packed apart": tr.Mask.documents([0, 4, 13], [0, 9, 20]),
        "lengths": tr.Mask.lengths([3, 3, 7]) & tr.Mask.causal(),
    }
    for kind, mask in kinds.items():
        again = read(to_text(mask), tr.Mask)
        assert again == mask and hash(again) == hash(mask), kind
        positions = torch.arange(13)
        assert torch.equal(again.dense(positions, positions), mask.dense(positions, positions)), kind


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_plan_reads_back(world: int, direction: str) -> None:
    kv_layout = tr.Layout.striped(31, world)
    for name in (*schedule_names(world, direction == "backward"), "auto"):
        for mask in (tr.Mask.causal(), tr.Mask.window(4), tr.Mask.full()):
            shape = tr.AttentionShape(2, 29, 31, 4, 2, 8, 6, dtype=torch.float16)
            options = {"mask": mask, "direction": direction, "partial_dtype": "float32"}
            plan = tr.plan(
                name, world=world, shape=shape, layout=tr.Layout.zigzag(29, world), kv_layout=kv_layout, **options
            )
            again = read(to_text(plan), tr.Plan)
            assert again == plan and hash(again) == hash(plan), name
            assert plan_of_tensor(plan_tensor(plan)) == plan
            assert [again.steps(r) for r in range(world)] == [plan.steps(r) for r in range(world)]


def test_topologies_read_back() -> None:
    for topology in (Topology.mesh(4, 50, 3.5), Topology.nodes(2, 4, intra=450, inter=50)):
        assert read(to_text(topology), Topology) == topology


def make_plan() -> tr.Plan:
    shape = tr.AttentionShape(1, 12, 12, 2, 1, 8, dtype=torch.float32)
    return tr.plan("ring", world=2, shape=shape, layout="zigzag")


def test_a_plan_that_no_name_makes_is_refused() -> None:
    for odd in (replace(make_plan(), schedule="mine"), replace(make_plan(), builder=lambda problem, rank: ())):
        with pytest.raises(ValueError, match="has no text, because no name makes its steps"):
            to_text(odd)


def test_tensors_that_hold_no_plan_are_refused() -> None:
    for tensor, said in (
        (torch.zeros(3), "torch.float32 tensor of shape"),
        (torch.zeros(2, 2, dtype=torch.uint8), "give a Plan, or what tokenring.plan_tensor made"),
        (torch.zeros(2, dtype=torch.uint8), "holds no plan"),
        (plan_tensor(make_plan())[:-1], "holds no plan"),
    ):
        with pytest.raises(ValueError, match=said):
            plan_of_tensor(tensor)
    with pytest.raises(ValueError, match="plan is a str"):
        plan_tensor("ring")


def test_another_process_reads_an_equal_plan() -> None:
    text = to_text(make_plan())
    code = "import sys, json; from tokenring.plans.spec import plan_of, to_text; print(to_text(plan_of(json.loads(sys.argv[1]))))"
    shown = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == text


@pytest.mark.parametrize("name", ["api", "plans.spec", "operators", "checkpoint"])
def test_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(f"tokenring.{name}")
    shown = doctest.testmod(module, extraglobs={"torch": torch})
    assert shown.failed == 0 and shown.attempted > 0

"""Topologies: routes and times against closed forms, files, refusals."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import pickle
from itertools import islice
from pathlib import Path

import pytest
import torch

from tokenring.links.costs import ComputeRate, Costs
from tokenring.topology import Topology

KINDS = (Topology.mesh, Topology.switch, Topology.ring, Topology.bus)
SOME = (
    *(make(5, 7.5, 2.0) for make in KINDS),
    Topology.switch(4, 26, flow_gbytes_per_s=13),
    Topology.mesh(3, 4).with_rates({"0>1": 1, "2>0": 2.5}),
    Topology.nodes(2, 4, intra=Topology.ring(4, 40, 2), inter=5, latency_us=9, nic_per="rank"),
    Topology.nodes(3, 2, intra=450, inter=50, through_ports=True).with_rates({"up 1": 10, "node 2: out 0": 100}),
    Topology.bus(
        2,
        1,
        costs=Costs(
            compute=(ComputeRate(forward_flops=2e12), ComputeRate(forward_flops=1e12, tile_us=3, dtype="float32")),
            merge_gbytes_per_s=30,
            message_us=4,
            slowdown=0.25,
        ),
        note="by hand",
    ),
)


def names(topology: Topology, source: int, destination: int) -> list[str]:
    return [link.name for link in topology.route(source, destination)]


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", SOME, ids=lambda t: t.kind)
def test_a_topology_is_a_value(topology: Topology) -> None:
    again = pickle.loads(pickle.dumps(topology))
    assert again == topology and hash(again) == hash(topology) and len({again, topology}) == 1
    with pytest.raises(AttributeError):
        topology.world = 9  # type: ignore[misc]


def test_every_field_but_the_note_counts_for_equality() -> None:
    base = Topology.mesh(4, 5.0)
    unlike = [
        Topology.mesh(5, 5.0),
        Topology.mesh(4, 6.0),
        Topology.mesh(4, 5.0, 1.0),
        Topology.switch(4, 5.0),
        Topology.mesh(4, 5.0, flow_gbytes_per_s=1.0),
        Topology.mesh(4, 5.0, costs=Costs()),
        base.with_rates({"0>1": 1.0}),
    ]
    assert all(base != other for other in unlike) and len({base, *unlike}) == 8
    assert base == Topology.mesh(4, 5, note="elsewhere")


# -- routes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("make", KINDS)
def test_routes_use_listed_links_and_every_link_is_used(make: object, world: int) -> None:
    topology = make(world, 3.0)
    listed = [link.name for link in topology.links()]
    pairs = [(s, d) for s in range(world) for d in range(world) if s != d]
    used = {name for pair in pairs for name in names(topology, *pair)}
    assert len(listed) == len(set(listed)) and used == set(listed)
    assert all(topology.rate(*pair) == 3.0 for pair in pairs)


def test_routes_by_kind() -> None:
    assert names(Topology.mesh(4, 1), 3, 1) == ["3>1"]
    assert names(Topology.switch(4, 1), 3, 1) == ["out 3", "in 1"]
    assert names(Topology.bus(4, 1), 3, 1) == names(Topology.bus(4, 1), 0, 2) == ["bus"]
    ring = Topology.ring(6, 1, latency_us=2)
    assert names(ring, 5, 1) == ["5>0", "0>1"]
    assert names(ring, 1, 5) == ["1>0", "0>5"]
    assert names(ring, 1, 4) == ["1>2", "2>3", "3>4"]  # a tie goes upwards
    assert ring.latency_seconds(1, 4) == pytest.approx(6e-6)


@pytest.mark.parametrize(
    ("options", "across"),
    [
        ({}, ["up 0", "down 1"]),
        ({"nic_per": "rank"}, ["nic out 1", "nic in 5"]),
        ({"through_ports": True}, ["node 0: out 1", "up 0", "down 1", "node 1: in 2"]),
    ],
)
def test_routes_of_nodes(options: dict, across: list[str]) -> None:
    topology = Topology.nodes(2, 3, intra=Topology.switch(3, 100, 1.0), inter=10, latency_us=5, **options)
    assert names(topology, 1, 5) == across
    assert names(topology, 4, 3) == ["node 1: out 1", "node 1: in 0"]
    assert topology.rate(1, 5) == 10 and topology.rate(4, 3) == 100
    assert [topology.latency_seconds(*pair) for pair in ((1, 5), (4, 3))] == pytest.approx([5e-6, 1e-6])
    assert [topology.node(rank) for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    pairs = [(s, d) for s in range(6) for d in range(6) if s != d]
    assert {name for pair in pairs for name in names(topology, *pair)} == {link.name for link in topology.links()}


def test_nodes_limit_messages_where_they_are() -> None:
    topology = Topology.nodes(2, 2, intra=Topology.switch(2, 100, flow_gbytes_per_s=30), inter=50, flow_gbytes_per_s=5)
    assert topology.rate(0, 1) == 30 and topology.rate(0, 2) == 5


def test_links_with_a_rate_of_their_own() -> None:
    inside = Topology.mesh(2, 100).with_rates({"0>1": 7})
    topology = Topology.nodes(2, 2, intra=inside, inter=50).with_rates({"node 1: 0>1": 3, "up 0": 9})
    assert [topology.rate(*pair) for pair in ((0, 1), (1, 0), (2, 3), (0, 2), (2, 0))] == [7, 100, 3, 9, 50]
    assert topology.with_rates({"up 0": 11}).rate(0, 2) == 11


def test_a_thousand_ranks_cost_nothing() -> None:
    topology = Topology.mesh(1024, 50)
    assert [link.name for link in islice(topology.links(), 2)] == ["0>1", "0>2"]
    assert topology.seconds([(r, (r + 1) % 1024, 50e9) for r in range(1024)]) == pytest.approx(1.0)
    assert len(repr(topology)) < 400 and len(pickle.dumps(topology)) < 1000


# -- times -------------------------------------------------------------------------------------------------------------


def around(world: int, ways: tuple[int, ...] = (1,), size: float = 6e9) -> list[tuple[int, int, float]]:
    return [(r, (r + way) % world, size) for r in range(world) for way in ways]


def test_times_of_one_way_both_ways_and_all_peers() -> None:
    """Six GB a message over 2 GB/s; a ring of 5 carries one message at distance 1 and two at distance 2 on each link."""
    one, both, every = around(5), around(5, (1, -1)), around(5, (1, 2, 3, 4))
    expected = {"mesh": (3, 3, 3), "switch": (3, 6, 12), "ring": (3, 3, 9), "bus": (15, 30, 60)}
    for make in KINDS:
        topology = make(5, 2.0)
        shown = tuple(topology.seconds(messages) for messages in (one, both, every))
        assert shown == pytest.approx(expected[topology.kind]), topology.kind


def test_times_between_nodes() -> None:
    """Each of 4 ranks sends 6 GB to both ranks of the other node; the port of a node carries four messages, of a rank two."""
    messages = [(s, d, 6e9) for s in range(4) for d in range(4) if s // 2 != d // 2]
    assert Topology.nodes(2, 2, intra=100, inter=2).seconds(messages) == pytest.approx(12)
    assert Topology.nodes(2, 2, intra=100, inter=2, nic_per="rank").seconds(messages) == pytest.approx(6)
    assert Topology.nodes(2, 2, intra=1, inter=4, through_ports=True).seconds(messages) == pytest.approx(12)


def test_latency_is_added_and_a_flow_keeps_its_limit() -> None:
    topology = Topology.switch(3, 4.0, latency_us=1e6, flow_gbytes_per_s=1.0)
    assert topology.arrivals([(0, 1, 2e9), (0, 2, 4e9)]) == pytest.approx([3.0, 5.0])
    assert topology.arrivals([(0, 1, 0.0)]) == [1.0] and topology.seconds([]) == 0.0


def test_a_message_that_ends_leaves_its_share_to_others() -> None:
    """Two share a port at 1 each until the first has sent its 1; the second sends the other 2 of its 3 at 2."""
    assert Topology.switch(3, 2.0).arrivals([(0, 1, 1e9), (0, 2, 3e9)]) == pytest.approx([1.0, 2.0])


# -- files and text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", SOME, ids=lambda t: t.kind)
def test_a_saved_topology_loads_the_same(topology: Topology, tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    topology.save(path)
    again = Topology.load(path)
    assert again == topology and again.note == topology.note
    assert Topology.from_dict(json.loads(json.dumps(topology.to_dict()))) == topology


BASE = Topology.mesh(4, 5).to_dict()
BROKEN = [
    ([], "topology is a list"),
    ({}, "has format None"),
    (BASE | {"version": 2}, "version 2; this release reads"),
    (BASE | {"gbyte_per_s": 5}, "has the key 'gbyte_per_s'; allowed are kind, world, gbytes_per_s"),
    ({k: v for k, v in BASE.items() if k != "world"}, "lacks the key 'world'"),
    (BASE | {"kind": "torus"}, "kind is 'torus'; give one of mesh, switch, ring, bus, nodes"),
    (BASE | {"world": 2.5}, "world=2.5; give a whole number"),
    (BASE | {"gbytes_per_s": "fast"}, "gbytes_per_s='fast'; give GB/s"),
    (BASE | {"rates": {"0>1": 3}}, r"rates is \{'0>1': 3\}; give a list of"),
    (BASE | {"rates": [["0>9", 3]]}, "no link is named '0>9'; a mesh of 4 ranks has links 0>1, 0>2"),
    (BASE | {"rates": [["0>1", -3]]}, "rate of '0>1'=-3; give GB/s"),
    (BASE | {"intra": {"kind": "mesh"}}, "topology: intra lacks the key 'world'"),
    (BASE | {"intra": {"kind": "mesh", "world": 2, "gbytes_per_s": 1}}, "only Topology.nodes has it"),
    (BASE | {"costs": {"merge": 3}}, "topology: costs has the key 'merge'; allowed are compute, merge_gbytes_per_s"),
    (BASE | {"costs": {"compute": {"float32": 1}}}, "give a list of objects"),
    (BASE | {"costs": {"compute": [{"forward_flops": 0}]}}, r"compute\[0\]: ComputeRate got forward_flops=0"),
    (BASE | {"note": 3}, "note=3; give text"),
]


@pytest.mark.parametrize(("values", "message"), BROKEN)
def test_a_broken_file_is_refused_by_name(values: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Topology.from_dict(values)  # type: ignore[arg-type]


def test_what_is_no_json_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    path.write_text("mesh 4")
    with pytest.raises(ValueError, match=r"links\.json is no JSON: .*; give a file that Topology\.save wrote"):
        Topology.load(path)


def test_describe_names_links_rates_costs_and_where_they_are_from() -> None:
    text = SOME[-1].describe()
    assert "bus of 2 ranks   (by hand)" in text and "one link for all: 1 GB/s" in text
    assert "computing float32: 1000 Gflop/s forward, 1000 backward, 3 us a kernel call" in text
    assert "merge 30 GB/s, 4 us a message, 0 us an operation, 25% slower while messages move" in text
    nodes = SOME[-2].describe()
    assert "inside each node switch of 2 ranks, and its rank's port there" in nodes and "up 1: 10 GB/s" in nodes
    assert "computing: unknown, only communication is modelled" in nodes


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Topology.mesh(0, 5), "Topology.mesh got world=0; give a whole number, 1 or more"),
        (lambda: Topology.ring(4, 0), "Topology.ring got gbytes_per_s=0; give GB/s"),
        (lambda: Topology.bus(4, math.inf), "Topology.bus got gbytes_per_s=inf"),
        (lambda: Topology.switch(4, True), "gbytes_per_s=True"),
        (lambda: Topology.switch(4, 5, -1), "latency_us=-1; give microseconds, 0 or more"),
        (lambda: Topology.switch(4, 5, flow_gbytes_per_s=0), "flow_gbytes_per_s=0; give GB/s above 0, or None"),
        (lambda: Topology.mesh(4, 5, nic_per="rank"), "Topology.mesh got nic_per='rank'; only Topology.nodes has it"),
        (lambda: Topology.mesh(4, 5, costs={}), r"costs=\{\}; give a tokenring.links.costs.Costs or None"),
        (lambda: Topology.nodes(2, 0, intra=5, inter=1), "per_node=0; give a whole number"),
        (lambda: Topology.nodes(2, 2, intra="fast", inter=1), "intra='fast'; give GB/s of a switch's ports"),
        (lambda: Topology.nodes(2, 2, intra=5, inter=None), "inter=None; give GB/s"),
        (lambda: Topology.nodes(2, 4, intra=Topology.mesh(2, 5), inter=1), "per_node=4 and an intra of 2 ranks"),
        (lambda: Topology.nodes(2, 2, intra=5, inter=1, nic_per="card"), 'nic_per=\'card\'; give "node" or "rank"'),
        (
            lambda: Topology.nodes(2, 2, intra=Topology.mesh(2, 5), inter=1, through_ports=True),
            "through_ports=True and a mesh inside; only a switch has ports",
        ),
        (lambda: Topology.nodes(2, 4, intra=SOME[-2], inter=1), "an intra of 6 ranks"),
        (lambda: Topology.nodes(2, 6, intra=SOME[-2], inter=1), "an intra of kind nodes"),
        (lambda: Topology.mesh(4, 5).with_rates({"1>1": 3}), "no link is named '1>1'"),
        (lambda: Topology.mesh(4, 5).with_rates({"0>1": 0}), "rate of '0>1'=0; give GB/s"),
        (lambda: Topology.mesh(4, 5).route(0, 4), "destination is 4; this topology has ranks 0 to 3"),
        (lambda: Topology.mesh(4, 5).rate(-1, 2), "source is -1"),
        (lambda: Topology.mesh(4, 5).route(2, 2), "source and destination are both 2"),
        (lambda: ComputeRate(forward_flops=1, dtype="float33"), "dtype='float33'; give \"any\" or a name"),
        (lambda: ComputeRate(forward_flops=1, backward_flops=-1), "backward_flops=-1; give flop/s above 0, or None"),
        (lambda: ComputeRate(forward_flops=1, tile_us=-1), "tile_us=-1; give microseconds"),
        (lambda: Costs(slowdown=2), "slowdown=2; give a share from 0 to 1"),
        (lambda: Costs(merge_gbytes_per_s=0), "merge_gbytes_per_s=0"),
        (lambda: Costs(message_us=-2), "message_us=-2"),
        (lambda: Costs(operation_us="1"), "operation_us='1'"),
        (lambda: Costs(compute=[]), "give a tuple of ComputeRate"),
        (lambda: Costs(compute=(ComputeRate(forward_flops=1),) * 2), "two compute rates of one dtype"),
    ],
)
def test_mistakes_are_refused_with_what_is_allowed(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- costs -------------------------------------------------------------------------------------------------------------


def test_a_dtype_finds_its_own_rate_or_the_one_for_any() -> None:
    costs = SOME[-1].costs
    assert costs.rate(torch.float32).forward_flops == 1e12 and costs.rate(torch.bfloat16).forward_flops == 2e12
    assert Costs(compute=(ComputeRate(forward_flops=1, dtype="float32"),)).rate(torch.float64) is None


def test_nodes_take_the_costs_of_what_is_inside() -> None:
    inside = Topology.switch(2, 5, costs=Costs(operation_us=3))
    assert Topology.nodes(2, 2, intra=inside, inter=1).costs == Costs(operation_us=3)
    assert Topology.nodes(2, 2, intra=inside, inter=1, costs=Costs(operation_us=4)).costs == Costs(operation_us=4)


@pytest.mark.parametrize("name", ["topology", "links.costs", "links.flows"])
def test_the_examples_in_the_docs_run(name: str) -> None:
    shown = doctest.testmod(importlib.import_module(f"tokenring.{name}"))
    assert shown.attempted and not shown.failed

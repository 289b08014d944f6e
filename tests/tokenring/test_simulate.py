"""Simulated times against closed forms: who is limited by what, for every schedule and kind of links.

Letters as in the formulas of the schedules: Q, KV, L are seconds that a rank's queries, its keys and values, or one float32
number a row and head take on a link; c the seconds of one full tile of a rank's queries against a rank's keys.
"""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import itertools

import pytest

import tokenring as tr
from tokenring.links.costs import ComputeRate, Costs
from tokenring.plans.plan import Plan
from tokenring.simulation.simulate import simulate
from tokenring.simulation.tasks import TENSORS
from tokenring.topology import Topology

ROWS, HEADS, DIM = 96, 8, 16
Q = ROWS * HEADS * DIM * 2 / 1e9
KV, L = 2 * Q, ROWS * HEADS * 4 / 1e9
"""Seconds at 1 GB/s: bfloat16, as many key heads as query heads, Dv = D."""
FLAT = (Topology.mesh, Topology.switch, Topology.ring, Topology.bus)


def planned(schedule: str, world: int, mask: str = "full", direction: str = "forward", heads: int = HEADS) -> Plan:
    length = ROWS * world
    shape = tr.AttentionShape(1, length, length, heads, heads, DIM)
    layout = "contiguous" if mask == "full" else "zigzag"
    return tr.plan(schedule, world=world, shape=shape, layout=layout, mask=mask, direction=direction)


def seconds(schedule: str, topology: Topology, **options: str) -> float:
    return simulate(planned(schedule, topology.world, **options), topology).seconds


# -- communication alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4, 5, 8])
def test_a_one_way_ring_uses_one_direction_wherever_it_runs(world: int) -> None:
    for make in (Topology.mesh, Topology.switch, Topology.ring):
        assert seconds("ring", make(world, 1.0)) == pytest.approx((world - 1) * KV), make
    assert seconds("ring", Topology.bus(world, 1.0)) == pytest.approx(world * (world - 1) * KV)


@pytest.mark.parametrize("world", [4, 5, 8])
def test_a_both_way_ring_halves_the_time_where_directions_are_links_of_their_own(world: int) -> None:
    assert seconds("biring", Topology.mesh(world, 1.0)) == pytest.approx((world - 1) * KV / 2)
    assert seconds("biring", Topology.ring(world, 1.0)) == pytest.approx((world - 1) * KV / 2)
    assert seconds("biring", Topology.switch(world, 1.0)) == pytest.approx((world - 1) * KV)
    assert seconds("biring", Topology.bus(world, 1.0)) == pytest.approx(world * (world - 1) * KV)


@pytest.mark.parametrize("world", [3, 5, 7])
def test_gather_uses_all_links_of_a_mesh_at_once(world: int) -> None:
    """On a ring of N a link carries the blocks of 1 + 2 + ... + (N-1)/2 ranks."""
    assert seconds("gather", Topology.mesh(world, 1.0)) == pytest.approx(KV)
    assert seconds("gather", Topology.switch(world, 1.0)) == pytest.approx((world - 1) * KV)
    assert seconds("gather", Topology.ring(world, 1.0)) == pytest.approx((world * world - 1) / 8 * KV)
    assert seconds("gather", Topology.bus(world, 1.0)) == pytest.approx(world * (world - 1) * KV)


@pytest.mark.parametrize("world", [4, 5, 8])
def test_tokenring_hides_returns_in_the_other_direction_of_a_mesh_only(world: int) -> None:
    """N-1 hops of the query and the last return; one port carries queries and returns one after the other."""
    assert seconds("tokenring", Topology.mesh(world, 1.0)) == pytest.approx((world - 1) * Q + Q + L)
    assert seconds("tokenring", Topology.switch(world, 1.0)) == pytest.approx((world - 1) * (2 * Q + L))
    assert seconds("tokenring", Topology.bus(world, 1.0)) == pytest.approx(world * (world - 1) * (2 * Q + L))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ulysses_moves_one_part_in_n_to_every_other_rank(world: int) -> None:
    assert seconds("ulysses", Topology.mesh(world, 1.0)) == pytest.approx((2 * Q + L + KV) / world)
    assert seconds("ulysses", Topology.switch(world, 1.0)) == pytest.approx((world - 1) / world * (2 * Q + L + KV))


def test_between_nodes_only_what_crosses_counts() -> None:
    """Two nodes of four, inside a thousand times faster. A ring crosses with one block at a time, gather with 4 x 4 blocks,
    ring between nodes with one block of each of the four ranks."""
    topology = Topology.nodes(2, 4, intra=1000.0, inter=1.0)
    assert seconds("ring", topology) == pytest.approx(7 * KV, rel=0.02)
    assert seconds("gather", topology) == pytest.approx(16 * KV, rel=0.02)
    assert seconds("hybrid:ring/gather@4", topology) == pytest.approx(4 * KV, rel=0.02)
    own_ports = Topology.nodes(2, 4, intra=1000.0, inter=1.0, nic_per="rank")
    assert seconds("gather", own_ports) == pytest.approx(4 * KV, rel=0.02)
    assert seconds("hybrid:ring/gather@4", own_ports) == pytest.approx(KV, rel=0.02)


def test_latency_is_paid_by_every_hop_and_a_slow_link_by_all_that_pass() -> None:
    assert seconds("ring", Topology.mesh(5, 1.0, latency_us=200)) == pytest.approx(4 * (KV + 2e-4))
    assert seconds("ring", Topology.mesh(4, 1.0).with_rates({"1>2": 0.25})) == pytest.approx(3 * 4 * KV)
    assert seconds("ring", Topology.mesh(4, 1.0).with_rates({"1>3": 0.25})) == pytest.approx(3 * KV)


def test_a_message_limit_leaves_room_for_a_second_message() -> None:
    """Ports of 2, one message at most at 1: a one-way ring reaches half of the port, a both-way ring all of it."""
    topology = Topology.switch(5, 2.0, flow_gbytes_per_s=1.0)
    assert seconds("ring", topology) == pytest.approx(4 * KV)
    assert seconds("biring", topology) == pytest.approx(2 * KV)


def test_a_causal_mask_halves_what_wraps_yet_not_the_time_of_a_ring() -> None:
    """On every hop somebody still passes a whole block on, and the others wait for it."""
    topology = Topology.mesh(8, 1.0)
    plan = planned("ring", 8, "causal")
    sent = [plan.bytes_sent(rank) for rank in range(8)]
    assert sum(sent) / 8 == pytest.approx(0.75 * 7 * KV * 1e9, rel=0.05)
    assert 0.9 * 7 * KV <= simulate(plan, topology).seconds <= 7 * KV * (1 + 1e-9)


# -- computing ---------------------------------------------------------------------------------------------------------


def with_tiles(topology: Topology, tile_seconds: float, **options: float) -> Topology:
    """The same with ranks on which a full tile of ROWS x ROWS takes `tile_seconds`."""
    flops = 2 * ROWS * ROWS * HEADS * 2 * DIM
    costs = Costs(compute=(ComputeRate(forward_flops=flops / tile_seconds),), **options)
    return dataclasses.replace(topology, costs=costs)


@pytest.mark.parametrize("c", [3 * KV, 0.25 * KV])
def test_a_ring_takes_what_is_longer_of_computing_and_moving(c: float) -> None:
    """N tiles where moving hides; N-1 hops and the last tile where it does not."""
    timeline = simulate(planned("ring", 5), with_tiles(Topology.mesh(5, 1.0), c))
    assert timeline.seconds == pytest.approx(5 * c if c > KV else 4 * KV + c)
    assert timeline.exposed_seconds == pytest.approx(timeline.seconds - 5 * c, abs=1e-12)
    assert all(rank.compute == pytest.approx(5 * c) for rank in timeline.ranks) and timeline.computing


def test_gather_hides_behind_the_own_block_only() -> None:
    c = 0.25 * KV
    assert seconds("gather", with_tiles(Topology.mesh(5, 1.0), c)) == pytest.approx(KV + 4 * c)


def test_backward_work_counts_five_products_and_its_own_rate() -> None:
    rate = ComputeRate(forward_flops=1e9, backward_flops=2e9)
    topology = Topology.mesh(1, 1.0, costs=Costs(compute=(rate,)))
    forward, backward = (
        simulate(planned("ring", 1, direction=direction), topology).seconds for direction in ("forward", "backward")
    )
    pairs = ROWS * ROWS * HEADS * DIM
    assert forward == pytest.approx(4 * pairs / 1e9) and backward == pytest.approx(10 * pairs / 2e9)


def test_batches_heads_and_value_widths_count() -> None:
    shape = tr.AttentionShape(3, ROWS, ROWS, 8, 2, DIM, v_head_dim=5)
    plan = tr.plan("ring", world=1, shape=shape, layout="contiguous", mask="causal")
    topology = Topology.mesh(1, 1.0, costs=Costs(compute=(ComputeRate(forward_flops=1e9),)))
    pairs = ROWS * (ROWS + 1) // 2
    assert simulate(plan, topology).seconds == pytest.approx(2 * 3 * pairs * 8 * (DIM + 5) / 1e9)


def test_computing_is_slower_while_messages_move() -> None:
    """A hop h beside a tile c at half speed: h / 2 is done when the hop ends, the rest at full speed; then one tile more."""
    h, c = KV, 2 * KV
    timeline = simulate(planned("ring", 2), with_tiles(Topology.mesh(2, 1.0), c, slowdown=0.5))
    assert timeline.seconds == pytest.approx(2 * c + h / 2)
    stopped = simulate(planned("ring", 2), with_tiles(Topology.mesh(2, 1.0), c, slowdown=1.0))
    assert stopped.seconds == pytest.approx(2 * c + h)


def test_fixed_costs_are_paid_for_every_tile_message_and_operation() -> None:
    plan = planned("ring", 3, "causal")
    operations = [operation for operation in plan.operations(1) if operation.verb != "free"]
    tiles = sum(len(operation.what.tiles) for operation in operations if operation.verb == "compute")
    moves = [t for step in plan.steps(1) for side in (step.sends, step.receives) for lane in side for t in lane]
    costs = Costs(compute=(ComputeRate(forward_flops=1e18, tile_us=7),), operation_us=3, message_us=2)
    rank = simulate(plan, Topology.mesh(3, 1e9, costs=costs)).ranks[1]
    busy = 7 * tiles + 3 * len(operations) + 2 * sum(TENSORS[t.what] for t in moves)
    assert rank.busy == pytest.approx(1e-6 * busy, rel=1e-3)


def test_merging_costs_its_bytes_and_a_first_whole_merge_nothing() -> None:
    """A full ring of 3 merges three partials of float32 size; the first becomes the result as it is."""
    timeline = simulate(planned("ring", 3), Topology.mesh(3, 1.0, costs=Costs(merge_gbytes_per_s=0.5)))
    partial = ROWS * HEADS * DIM * 4 / 0.5e9
    assert all(rank.merge == pytest.approx(2 * partial) for rank in timeline.ranks)
    assert not timeline.computing and "communication only" in timeline.describe()


# -- what a timeline says ----------------------------------------------------------------------------------------------

SCHEDULES = (
    "ring",
    "biring",
    "tokenring",
    "gather",
    "mesh:2x4",
    "mesh:4x2",
    "ulysses",
    "usp:2x4",
    "hybrid:ring/tokenring@4",
)
TOPOLOGIES = (
    *(make(8, 2.0, 1.0) for make in FLAT),
    Topology.nodes(2, 4, intra=10.0, inter=1.0, latency_us=4),
    Topology.nodes(4, 2, intra=Topology.mesh(2, 10.0), inter=1.0, nic_per="rank"),
    Topology.nodes(2, 4, intra=Topology.ring(4, 3.0), inter=1.0),
)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: t.kind)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bytes_add_up_and_no_bound_is_beaten(schedule: str, direction: str, topology: Topology) -> None:
    plan = planned(schedule, 8, "causal", direction)
    priced = with_tiles(topology, 0.3 * KV, merge_gbytes_per_s=20, operation_us=1)
    timeline = simulate(plan, priced)
    rates = {link.name: link.gbytes_per_s for link in topology.links()}
    expected = dict.fromkeys(rates, 0)
    for source, destination in itertools.permutations(range(8), 2):
        for link in topology.route(source, destination):
            expected[link.name] += plan.bytes_sent(source, destination)
    carried = {link.name: link.bytes for link in timeline.links}
    assert carried == {name: size for name, size in expected.items() if size}
    for link in timeline.links:
        assert link.bytes / rates[link.name] / 1e9 <= link.busy * (1 + 1e-6) <= timeline.seconds * (1 + 2e-6)
    assert max(rank.end for rank in timeline.ranks) == timeline.seconds
    assert 0 <= timeline.exposed_seconds <= timeline.seconds and not timeline.sampled
    assert simulate(plan, priced) == timeline and len({timeline}) == 1


def test_describe_shows_ranks_and_the_busiest_links() -> None:
    lines = simulate(planned("ring", 20), with_tiles(Topology.mesh(20, 1.0), KV)).describe().splitlines()
    assert lines[0].startswith("modelled: ") and lines[0].endswith("(computing and communication, all ranks)")
    assert lines[1].split() == ["rank", "compute", "merge", "overhead", "wait", "end"]
    assert [line.split()[0] for line in lines[2:18]] == [str(rank) for rank in range(16)]
    assert lines[18] == "   and 4 more ranks" and lines[-1] == "and 8 more links"


def test_worlds_must_agree() -> None:
    with pytest.raises(ValueError, match="the plan has 4 ranks, the topology 5; give one of the same world"):
        simulate(planned("ring", 4), Topology.mesh(5, 1.0))


# -- large worlds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: t.kind)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_block_stands_for_all_where_all_do_the_same(schedule: str, direction: str, topology: Topology) -> None:
    plan = planned(schedule, 8, direction=direction)
    priced = with_tiles(topology, 0.3 * KV, merge_gbytes_per_s=20)
    every, some = simulate(plan, priced, exact=True), simulate(plan, priced, exact=False)
    grid_on_a_ring = topology.kind == "ring" and ":" in schedule  # neighbours in a grid are not equally far apart there
    assert some.seconds == pytest.approx(every.seconds, rel=0.6 if grid_on_a_ring else 1e-6)
    assert some.sampled and len(some.ranks) == (topology.intra.world if topology.intra else 1)
    assert not every.sampled and len(every.ranks) == 8


@pytest.mark.parametrize("topology", [Topology.mesh(16, 1.0), Topology.switch(16, 1.0)], ids=lambda t: t.kind)
@pytest.mark.parametrize("schedule", ["ring", "biring", "tokenring", "gather", "mesh:4x4", "hybrid:ring/tokenring@4"])
def test_sampled_blocks_come_close_where_they_differ(schedule: str, topology: Topology) -> None:
    plan = planned(schedule, 16, "causal", heads=2)
    every, some = simulate(plan, topology, exact=True), simulate(plan, topology, exact=False)
    assert some.seconds == pytest.approx(every.seconds, rel=0.1)


def test_a_slow_link_counts_in_a_sampled_world_too() -> None:
    plan = planned("ring", 96)
    assert simulate(plan, Topology.mesh(96, 1.0)).seconds == pytest.approx(95 * KV)
    assert simulate(plan, Topology.mesh(96, 1.0).with_rates({"40>41": 0.25})).seconds == pytest.approx(4 * 95 * KV)


def test_a_thousand_ranks_are_modelled_from_a_few() -> None:
    plan = planned("ring", 1024)
    for topology in (Topology.mesh(1024, 1.0), Topology.switch(1024, 1.0)):
        timeline = simulate(plan, topology)
        assert timeline.seconds == pytest.approx(1023 * KV) and timeline.sampled
        assert "ranks that stand for all" in timeline.describe()


def test_the_example_in_the_docs_runs() -> None:
    shown = doctest.testmod(importlib.import_module("tokenring.simulation.simulate"))
    assert shown.attempted and not shown.failed

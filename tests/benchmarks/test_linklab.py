"""The link lab's own rules: ways, rates, bounds, tables. Nothing here needs root."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.linklab import lab, report
from benchmarks.linklab.__main__ import main
from benchmarks.linklab.bounds import bound, one_link
from benchmarks.linklab.cells import HEAD_DIM, ROWS, Cell, model
from benchmarks.linklab.measure import Result, Row
from benchmarks.linklab.raw import disjoint_rounds, floor
from benchmarks.linklab.wiring import wire
from benchmarks.record import write

TOPOLOGIES = ("mesh", "ring", "switch", "bus", "nodes:2x2")
RATE = 1000.0
KV = ROWS * 2 * 4 * HEAD_DIM * 4
"""Bytes of one rank's keys and values in a cell of 4 key heads, float32."""


def unit_rates(cell: Cell) -> dict:
    return dict.fromkeys(cell.wiring.shaped, RATE)


def seconds(schedule: str, **options: object) -> float:
    """The bound of a schedule at `RATE` bytes per second on every link, in units of KV / RATE."""
    cell = Cell(**{"kv_heads": 4} | options)
    return bound(cell.plan(schedule), cell.wiring, unit_rates(cell)) * RATE / KV


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_ways_start_and_end_at_their_ranks_and_use_cables_that_exist(name: str) -> None:
    wiring = wire(name, 4, 40)
    for (source, destination), way in wiring.ways.items():
        assert (way[0], way[-1]) == (f"r{source}", f"r{destination}")
        assert set(pairwise(way)) <= set(wiring.mbit)
        assert wiring.crosses(source, destination)


@pytest.mark.parametrize("world", [2, 3, 4, 5, 6])
def test_a_ring_takes_the_shorter_way_and_hop_by_hop_forwarding_agrees_with_it(world: int) -> None:
    wiring = wire("ring", world, 40)
    for (source, destination), way in wiring.ways.items():
        apart = (destination - source) % world
        assert len(way) - 1 == min(apart, world - apart)
        if len(way) > 2:
            assert wiring.ways[int(way[1][1:]), destination] == way[1:]


def test_a_bus_has_one_link_and_a_node_one_uplink_each_way() -> None:
    assert {wire("bus", 4, 40).crosses(i, j) for i, j in wire("bus", 4, 40).ways} == {(("in", "out"),)}
    nodes = wire("nodes:2x2", 4, 40, 8)
    assert nodes.crosses(1, 2) == (("r1", "node0"), ("node0", "top"), ("top", "node1"), ("node1", "r2"))
    assert nodes.shaped["node0", "top"] == 8 and nodes.shaped["r1", "node0"] == 40


@pytest.mark.parametrize(
    ("name", "world", "mbit", "inter"),
    [
        ("torus", 4, 40, None),
        ("mesh", 1, 40, None),
        ("mesh", 4, 0, None),
        ("mesh", 4, 40, 8),
        ("nodes:2x3", 4, 40, None),
    ],
)
def test_a_wiring_that_cannot_be_is_refused(name: str, world: int, mbit: float, inter: float | None) -> None:
    with pytest.raises(ValueError, match=r"give|leave it out"):
        wire(name, world, mbit, inter)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_library_and_the_lab_agree_on_the_links_between_two_ranks(name: str) -> None:
    wiring = wire(name, 4, 40)
    rates = {link: 1e6 * (index + 1) for index, link in enumerate(wiring.shaped)}
    topology = model(wiring, rates)
    for pair in wiring.ways:
        measured = [rates[link] for link in wiring.crosses(*pair)]
        assert [link.gbytes_per_s * 1e9 for link in topology.route(*pair)] == pytest.approx(measured)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_flows_measured_together_share_no_cable_and_cover_every_link(name: str) -> None:
    wiring = wire(name, 4, 40)
    covered = set()
    for pairs in disjoint_rounds(wiring):
        cables = [{frozenset(x) for ends in (pair, pair[::-1]) for x in wiring.crosses(*ends)} for pair in pairs]
        assert sum(map(len, cables)) == len(set().union(*cables))
        covered |= {link for pair in pairs for link in wiring.crosses(*pair)}
    assert covered == set(wiring.shaped)


def test_the_floor_of_some_flows_is_what_the_busiest_link_needs() -> None:
    wiring = wire("switch", 3, 40)
    assert floor(wiring, dict.fromkeys(wiring.shaped, 10.0), [(0, 1, 20), (0, 2, 30), (1, 2, 40)]) == 7.0


@pytest.mark.parametrize(
    ("schedule", "topology", "gqa", "blocks"),
    [
        ("ring", "mesh", 1, 3),
        ("ring", "mesh", 4, 3),
        ("biring", "mesh", 1, 1.5),
        ("biring", "switch", 1, 3),
        ("biring", "ring", 1, 1.5),
        ("gather", "mesh", 1, 1),
        ("gather", "switch", 1, 3),
        ("gather", "bus", 1, 12),
        ("ring", "bus", 1, 12),
        ("ulysses", "bus", 1, 12 / 4 * 2 + 12 / 4 / 2 / HEAD_DIM),
        ("tokenring", "mesh", 1, 3 / 2 + (1 + 1 / HEAD_DIM) / 2),
        ("tokenring", "mesh", 4, 4 * (3 / 2 + (1 + 1 / HEAD_DIM) / 2)),
        ("tokenring", "switch", 1, 3 * (2 + 1 / HEAD_DIM) / 2),
    ],
)
def test_bounds_on_equal_links_are_those_of_the_closed_formulas(
    schedule: str, topology: str, gqa: int, blocks: float
) -> None:
    assert seconds(schedule, topology=topology, gqa=gqa) == pytest.approx(blocks)


def test_backward_bounds_count_gradients_in_their_dtype() -> None:
    # On a mesh dk and dv of a step go back over a link that the keys of the ring use only on the last step.
    assert seconds("gather", topology="mesh", direction="backward") == pytest.approx(2)
    assert seconds("ring:direct", topology="mesh", direction="backward") == pytest.approx(4)


def test_a_bound_is_never_below_the_load_of_the_busiest_link() -> None:
    for topology in TOPOLOGIES:
        cell = Cell(topology=topology, kv_heads=4, mask="causal", gqa=2, ratio=0.25)
        for name in cell.schedules:
            plan = cell.plan(name)
            flows = [
                (s, d, plan.bytes_sent(s, d)) for s in range(4) for d in range(4) if s != d and plan.bytes_sent(s, d)
            ]
            least = floor(cell.wiring, unit_rates(cell), flows)
            assert bound(plan, cell.wiring, unit_rates(cell)) >= least * (1 - 1e-12)


def test_one_link_waits_for_heads_and_leaves_time_for_tails() -> None:
    assert one_link([(0, 2, 0), (0, 2, 0)]) == 4
    assert one_link([(0, 2, 3), (0, 1, 0), (4, 1, 0)]) == 5
    assert one_link([(1, 2, 1), (2, 2, 1)]) == 6


def test_a_cell_is_sized_by_its_fastest_schedule() -> None:
    cell = Cell(mbit=40, gqa=4)
    fastest = {
        seconds_: min(
            bound(sized.plan(name), sized.wiring, {k: v * 125_000 for k, v in sized.wiring.shaped.items()})
            for name in ("ring", "gather")
        )
        for seconds_ in (0.5, 1.0)
        if (sized := cell.sized(["ring", "gather"], seconds_))
    }
    assert all(found == pytest.approx(asked, rel=0.05) for asked, found in fastest.items())


@pytest.mark.parametrize("options", [{"ratio": 0.3}, {"ratio": 2.0}, {"gqa": 0}])
def test_a_cell_refuses_what_leaves_no_whole_rows(options: dict) -> None:
    with pytest.raises(ValueError, match="give"):
        Cell(**options)


def test_the_lab_says_that_it_needs_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(lab.LabError, match="root"):
        lab.require()
    assert main(["run", "--topology", "mesh"]) == 2
    assert "root" in capsys.readouterr().err


def test_the_lab_names_missing_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    with pytest.raises(lab.LabError, match="needs tc; install"):
        lab.require()


def result(cell: Cell, auto: str, **times: float) -> Result:
    rows = [Row(name, [time, time + 0.1, time - 0.1], 1.0, time * 1.1, 10) for name, time in times.items()]
    return Result(cell, rows, auto, 0.01, 0.98)


def test_tables_name_the_best_the_choice_and_the_cells_that_tokenring_loses(tmp_path: Path) -> None:
    won = result(Cell(kv_heads=4, ratio=0.25), "tokenring", ring=2.0, tokenring=1.0)
    lost = result(Cell(kv_heads=4, gqa=4), "gather", ring=1.2, tokenring=3.0, gather=1.5)
    assert (won.best.schedule, lost.best.schedule, lost.auto_over_best) == ("tokenring", "ring", 1.25)
    table = report.grid_table([won, lost])
    losses = table[table.index("Where TokenRing loses") : table.index("over the bound")]
    assert "(1 of 2 cells)" in losses and lost.cell.title in losses
    assert won.cell.title not in losses
    assert "within 15%: 1 of 5" in table and "auto within 5% of the best in 1 of 2 cells, worst 1.25" in table
    assert "simulate() off by 10.0% on average, 10.0% at worst (" in table
    assert "tokenring faster than ring in 1 of 2 cells" in table and "biring" not in table
    assert "tokenring faster than every other in 1 of 2 cells" in table
    assert "0.500" in report.cell_table(won), "tokenring as a share of the ring"
    write(tmp_path / "grid.json", "a grid", [each.to_dict() for each in (won, lost)])
    assert '"kind": "measured"' in (tmp_path / "grid.json").read_text()

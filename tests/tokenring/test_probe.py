"""The probe: what it makes of times that links of a known kind would give, and that it ends alike on every rank.

The times fed to `fit` are closed forms written out here, not the library's own model: seconds per byte of each message of a
pattern, for links of rate 1 where nothing else is said.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

import tokenring as tr
from tests.pool import Pool
from tokenring.probing.fit import Observation, fit
from tokenring.probing.patterns import patterns
from tokenring.probing.probe import probe
from tokenring.topology import Topology
from tokenring.transport import TransportError, connect

Messages = tuple[tuple[int, int], ...]
Times = Callable[[Messages], list[float]]


def on_mesh(messages: Messages) -> list[float]:
    return [1.0 for _ in messages]


def on_switch(messages: Messages) -> list[float]:
    """In the probe's patterns the messages of a rank all wait for its busier port."""
    out, into = Counter(s for s, _ in messages), Counter(d for _, d in messages)
    return [float(max(out[s], into[d])) for s, d in messages]


def on_bus(messages: Messages) -> list[float]:
    return [float(len(messages)) for _ in messages]


def on_ring_of_four(messages: Messages) -> list[float]:
    """Upwards a message goes one or two links, downwards one; all that cross the fullest link of theirs end together."""
    links = [[(s + hop) % 4 for hop in range((d - s) % 4)] if (d - s) % 4 < 3 else [10 + s] for s, d in messages]
    users = Counter(link for path in links for link in path)
    return [float(max(users[link] for link in path)) for path in links]


def on_nodes_of_two(messages: Messages, *, inside: float = 10.0, shared: bool = True) -> list[float]:
    """Pair links of rate `inside`; between nodes ports of rate 1, of a node (`shared`) or of a rank."""
    across = [(s, d) for s, d in messages if s // 2 != d // 2]
    size = 2 if shared else 1
    up, down = Counter(s // size for s, _ in across), Counter(d // size for _, d in across)
    return [float(max(up[s // size], down[d // size])) if (s, d) in across else 1 / inside for s, d in messages]


def on_wide_switch(messages: Messages) -> list[float]:
    """Ports of rate 2, one message at most at rate 1."""
    return [max(1.0, x / 2) for x in on_switch(messages)]


def observed(world: int, times: Times, noise: float, rate: float = 5e9) -> list[Observation]:
    """What a rank that receives would time: until all that it sends and receives is done; a few per cent off."""
    draw = random.Random(world)
    found = []
    for messages in patterns(world):
        done: dict[int, float] = {}
        for (source, destination), seconds in zip(messages, times(messages)):
            for rank in (source, destination):
                done[rank] = max(done.get(rank, 0.0), seconds / rate)
        receivers = sorted({d for _, d in messages})
        found.append(Observation(messages, tuple((r, done[r] * (1 + noise * draw.uniform(-1, 1))) for r in receivers)))
    return found


CASES = [
    (2, on_mesh, Topology.mesh(2, 5)),
    (2, on_bus, Topology.bus(2, 5)),
    (3, on_mesh, Topology.mesh(3, 5)),
    (4, on_mesh, Topology.mesh(4, 5)),
    (7, on_mesh, Topology.mesh(7, 5)),
    (3, on_switch, Topology.switch(3, 5)),
    (4, on_switch, Topology.switch(4, 5)),
    (8, on_switch, Topology.switch(8, 5)),
    (4, on_wide_switch, Topology.switch(4, 10, flow_gbytes_per_s=5)),
    (4, on_ring_of_four, Topology.ring(4, 5)),
    (3, on_bus, Topology.bus(3, 5)),
    (5, on_bus, Topology.bus(5, 5)),
    (4, on_nodes_of_two, Topology.nodes(2, 2, intra=Topology.mesh(2, 50), inter=5)),
    (8, on_nodes_of_two, Topology.nodes(4, 2, intra=Topology.mesh(2, 50), inter=5)),
    (
        8,
        lambda messages: on_nodes_of_two(messages, shared=False),
        Topology.nodes(4, 2, intra=Topology.mesh(2, 50), inter=5, nic_per="rank"),
    ),
]


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize(("world", "times", "truth"), CASES, ids=lambda x: getattr(x, "kind", ""))
def test_the_kind_and_the_rates_are_found(world: int, times: Times, truth: Topology, noise: float) -> None:
    found = fit(world, observed(world, times, noise))
    shown = found.topology
    inner, true_inner = shown.intra or shown, truth.intra or truth
    assert (shown.kind, shown.nic_per, inner.kind) == (truth.kind, truth.nic_per, true_inner.kind)
    assert shown.gbytes_per_s == pytest.approx(truth.gbytes_per_s, rel=0.05)
    assert inner.gbytes_per_s == pytest.approx(true_inner.gbytes_per_s, rel=0.05)
    assert (shown.flow_gbytes_per_s or 0) == pytest.approx(truth.flow_gbytes_per_s or 0, rel=0.05)
    assert not shown.rates and found.error <= noise + 1e-6


@pytest.mark.parametrize("pair", [(0, 1), (2, 0)])
@pytest.mark.parametrize("world", [3, 4, 6])
def test_one_slow_link_of_a_mesh_is_named(world: int, pair: tuple[int, int]) -> None:
    found = fit(world, observed(world, lambda m: [4.0 if p == pair else 1.0 for p in m], 0.05)).topology
    assert found.kind == "mesh" and found.gbytes_per_s == pytest.approx(5, rel=0.05)
    assert [name for name, _ in found.rates] == ["{}>{}".format(*pair)]
    assert found.rate(*pair) == pytest.approx(1.25, rel=0.1)


def test_nodes_are_found_with_and_without_knowing_the_machines() -> None:
    """Without, the block size whose pairs differ most is tried; a wrong hint does not win."""
    times = observed(8, on_nodes_of_two, 0.0)
    assert [fit(8, times, size).topology.intra.world for size in (None, 2, 4)] == [2, 2, 2]


def test_patterns_reach_every_pair_by_itself_and_stay_few_in_large_worlds() -> None:
    for world in range(2, 17):
        by_themselves = set()
        for messages in patterns(world):
            ranks = [rank for pair in messages for rank in pair]
            assert all(s != d and 0 <= s < world and 0 <= d < world for s, d in messages)
            assert len(set(messages)) == len(messages)
            if len(ranks) == len(set(ranks)):
                by_themselves |= set(messages)
        assert by_themselves == {(s, d) for s in range(world) for d in range(world) if s != d}
        assert len({frozenset(messages) for messages in patterns(world)}) == len(patterns(world))
    large = patterns(1024)
    assert len(large) < 20 and sum(map(len, large)) < 16 * 1024


def probed(group: object, seconds: float, compute: bool) -> tuple[Topology, int, float]:
    limit = connect(group).timeout_seconds
    with tr.count_traffic(group) as traffic:
        topology = probe(group, seconds=seconds, compute=compute)
    assert connect(group).timeout_seconds == limit
    return topology, sum(traffic.sent.values()), topology.latency_us


def check_alike(results: list, world: int) -> None:
    first = results[0][0]
    assert all(topology == first and topology.note == first.note for topology, _, _ in results)
    assert first.world == world and first.latency_us >= 0 and "measured on" in first.note
    assert all(first.rate(s, d) > 0 for s in range(world) for d in range(world) if s != d)
    if first.costs is None:
        assert all(sent == 0 for _, sent, _ in results)  # what a probe of links sends is nobody's payload


@pytest.mark.parametrize("world", [2, 3, 5])
def test_a_probe_over_gloo_ends_alike_on_every_rank(pool: Pool, world: int) -> None:
    results = pool.run(world, probed, 0.2, False)
    check_alike(results, world)
    assert results[0][0].costs is None


def test_a_probe_measures_what_computing_costs(pool: Pool) -> None:
    results = pool.run(2, probed, 0.2, True)
    check_alike(results, 2)
    costs = results[0][0].costs
    assert {rate.dtype for rate in costs.compute} == {"float32", "bfloat16"}
    assert all(rate.forward_flops > 1e8 and rate.backward_flops > 1e8 and rate.tile_us >= 0 for rate in costs.compute)
    assert costs.merge_gbytes_per_s > 0.01 and 0 <= costs.message_us < 1e5 and 0 <= costs.operation_us < 1e6
    assert 0 <= costs.slowdown <= 1


def test_a_probe_between_threads_ends_alike_on_every_rank() -> None:
    check_alike(tr.run_local(3, probed, 0.1, False), 3)


def test_one_rank_alone_has_costs_and_no_links() -> None:
    with torch.inference_mode():
        topology = Topology.probe(None, seconds=0.1)
    assert (topology.kind, topology.world, list(topology.links())) == ("mesh", 1, [])
    assert topology.costs.message_us == 0 and "no link to measure" in topology.note


def stays_away(group: object) -> str:
    if connect(group).rank == 1:
        return ""
    with pytest.raises(TransportError) as caught:
        Topology.probe(group, seconds=0.1, timeout_seconds=0.2)
    return str(caught.value)


def test_a_probe_does_not_wait_for_ever() -> None:
    message = tr.run_local(2, stays_away)[0]
    assert "rank 0 of 2" in message and "rank 1" in message and "0.2 s" in message


@pytest.mark.parametrize("options", [{"seconds": 0}, {"seconds": "1"}, {"timeout_seconds": -1}])
def test_a_probe_refuses_times_that_are_none(options: dict) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"probe got {name}={value!r}; give seconds above 0"):
        Topology.probe(None, **options)

"""auto: the right schedule for the links, and why; it must not take TokenRing where TokenRing loses."""

from __future__ import annotations

import pytest
import torch

import tokenring as tr


def chosen(
    topology: tr.Topology, q_heads: int, kv_heads: int, *, q_share: float = 1.0, direction: str = "forward"
) -> tr.Plan:
    world, keys = topology.world, 4096
    shape = tr.AttentionShape(1, int(keys * q_share), keys, q_heads, kv_heads, 64, dtype=torch.float32)
    kv_layout = None if q_share == 1 else "contiguous"
    return tr.plan(
        "auto",
        world=world,
        shape=shape,
        layout="contiguous",
        kv_layout=kv_layout,
        mask="full",
        direction=direction,
        topology=topology,
    )


@pytest.mark.parametrize("make", [tr.Topology.mesh, tr.Topology.switch, tr.Topology.ring, tr.Topology.bus])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_auto_takes_the_least_simulated_time_of_all_it_compares(make, kv_heads: int, direction: str) -> None:
    from tokenring.choose import candidates

    topology = make(4, 1.0, 5.0)
    best = chosen(topology, 8, kv_heads, direction=direction)
    for name in candidates(best.problem, topology):
        other = tr.plan(name, world=4, shape=best.shape, layout="contiguous", mask="full", direction=direction)
        assert best.simulate(topology).seconds <= other.simulate(topology).seconds * (1 + 1e-9), name
        assert name in best.why
    assert best.why in best.explain(topology) and "exposed" in best.explain(topology)


def test_few_queries_against_many_cached_keys_move_the_queries() -> None:
    for make in (tr.Topology.mesh, tr.Topology.switch, tr.Topology.bus):
        assert chosen(make(4, 1.0), 8, 8, q_share=1 / 64).schedule == "tokenring"


def test_grouped_heads_on_a_port_limited_network_do_not_take_tokenring() -> None:
    assert chosen(tr.Topology.switch(4, 1.0), 8, 1).schedule != "tokenring"
    assert chosen(tr.Topology.ring(4, 1.0), 8, 1).schedule != "tokenring"


def test_on_pair_links_tokenring_beats_the_one_way_ring_for_ungrouped_heads() -> None:
    mesh = tr.Topology.mesh(4, 1.0)
    shape = tr.AttentionShape(1, 4096, 4096, 8, 8, 64, dtype=torch.float32)
    seconds = {
        name: tr.plan(name, world=4, shape=shape, layout="contiguous", mask="full").simulate(mesh).seconds
        for name in ("ring", "biring", "tokenring", "gather")
    }
    assert seconds["tokenring"] < 0.75 * seconds["ring"] and seconds["biring"] < 0.6 * seconds["ring"]


def test_between_slow_nodes_keys_cross_once_a_block() -> None:
    nodes = tr.Topology.nodes(2, 4, intra=100.0, inter=1.0, nic_per="rank")
    plan = chosen(nodes, 8, 8)
    assert (
        plan.simulate(nodes).seconds
        <= chosen(tr.Topology.nodes(2, 4, intra=100.0, inter=1.0), 8, 8).simulate(nodes).seconds
    )
    assert "hybrid:ring/tokenring@4" in plan.why


def test_a_topology_of_another_world_is_refused() -> None:
    shape = tr.AttentionShape(1, 8, 8, 2, 2, 4)
    with pytest.raises(ValueError, match="topology has 4 ranks and the call 2"):
        tr.plan("auto", world=2, shape=shape, layout="zigzag", topology=tr.Topology.mesh(4, 1.0))


def test_attention_takes_the_topology() -> None:
    def attend(group, q):
        layout = tr.Layout.zigzag(16, 4)
        mine = layout.shard(q, group.rank())
        return layout.gather(
            tr.attention(mine, mine, mine, group=group, layout=layout, topology=tr.Topology.bus(4, 1.0)), group
        )

    q = torch.randn(1, 16, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(tr.run_local(4, attend, q)[2], tr.attention(q, q, q), rtol=0, atol=1e-12)

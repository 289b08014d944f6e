"""Foldings against Megatron-Core's own rank generator, and the rules they keep."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from moe import Folding

CASES = [
    {"world": 16, "tp": 2, "cp": 2, "pp": 2, "ep": 4, "etp": 1},
    {"world": 16, "tp": 2, "cp": 2, "pp": 1, "ep": 4, "etp": 2},
    {"world": 32, "tp": 2, "cp": 2, "pp": 2, "ep": 8, "etp": 1},
    {"world": 24, "tp": 2, "cp": 3, "pp": 2, "ep": 4, "etp": 3},
    {"world": 30, "tp": 5, "cp": 1, "pp": 3, "ep": 1, "etp": 10},
]


def megatron_groups(f: Folding, token: str, expert: bool) -> list[list[int]]:
    from megatron.core.parallel_state import RankGenerator

    if expert:
        made = RankGenerator(tp=f.etp, ep=f.ep, dp=f.edp, pp=f.pp, cp=1, order="tp-cp-ep-dp-pp")
    else:
        made = RankGenerator(tp=f.tp, ep=1, dp=f.dp, pp=f.pp, cp=f.cp, order="tp-cp-ep-dp-pp")
    return made.get_ranks(token)


@pytest.mark.parametrize("sizes", CASES)
def test_groups_equal_megatron_cores(sizes: dict[str, int]) -> None:
    f = Folding(**sizes)
    for axes in ("tp", "cp", "dp", "pp", "tp-cp", "tp-cp-dp", "dp-cp"):
        assert f.attention_groups(axes) == megatron_groups(f, axes, expert=False)
    for axes in ("etp", "ep", "edp", "pp", "etp-ep"):
        assert f.moe_groups(axes) == megatron_groups(f, axes.replace("etp", "tp").replace("edp", "dp"), expert=True)


def test_the_table_of_first_groups() -> None:
    f = Folding(world=16, tp=2, cp=2, pp=1, ep=4, etp=2)
    first = [f.groups(axis)[0] for axis in ("tp", "cp", "dp", "etp", "ep", "edp", "pp")]
    assert first == [[0, 1], [0, 2], [0, 4, 8, 12], [0, 1], [0, 2, 4, 6], [0, 8], [0]]


def listing_pp_groups(f: Folding) -> tuple[list[list[int]], list[list[int]]]:
    """Pipeline groups as the paper's listing makes them: (DP, PP, CP, TP) and (EDP, PP, EP, ETP), last axis fastest."""
    grid = torch.arange(f.world)
    attention = grid.view(f.dp, f.pp, f.cp * f.tp).permute(0, 2, 1).reshape(-1, f.pp)
    experts = grid.view(f.edp, f.pp, f.ep * f.etp).permute(0, 2, 1).reshape(-1, f.pp)
    return sorted(attention.tolist()), sorted(experts.tolist())


def test_pipeline_groups_agree_where_the_papers_listing_breaks_its_own_rule() -> None:
    total = broken = 0
    for f in Folding.enumerate(world=128, tp=(1, 2, 4, 8), cp=(1, 2, 4), pp=(1, 2, 4, 8), ep=(1, 2, 4, 8), etp=(1, 2)):
        assert f.attention_groups("pp") == f.moe_groups("pp")
        ours, theirs = listing_pp_groups(f)
        assert (ours == theirs) == (f.pp == 1 or f.tp * f.cp == f.ep * f.etp or f.dp == f.edp)
        broken += ours != theirs
        total += 1
    assert 0 < broken < total


def test_every_group_is_a_partition() -> None:
    for f in Folding.enumerate(world=12):
        for axes in ("tp", "cp", "dp", "pp", "etp", "ep", "edp"):
            assert sorted(itertools.chain(*f.groups(axes))) == list(range(12))
            assert {len(group) for group in f.groups(axes)} == {getattr(f, axes)}


def test_groups_that_leave_a_node() -> None:
    f = Folding(world=32, tp=4, cp=4, ep=8)
    assert f.leaving_groups("ep") == [] and not f.crosses_node("tp")
    assert f.crosses_node("cp") and len(f.leaving_groups("cp")) == 8
    assert f.crosses_node("ep", ranks_per_node=4)
    assert "leaving a node" in f.describe()
    with pytest.raises(ValueError, match="ranks_per_node is 0"):
        f.crosses_node("ep", ranks_per_node=0)


def test_enumerate_keeps_the_models_rules_and_misses_none() -> None:
    model = {"num_experts": 8, "heads": 4, "kv_heads": 2, "layers": 6, "sequence": 64, "expert_ffn": 24}
    found = set(Folding.enumerate(world=8, **model))
    sizes = itertools.product(range(1, 9), repeat=5)
    legal = set()
    for tp, cp, pp, ep, etp in sizes:
        fits = 8 % (tp * cp * pp) == 0 == 8 % (etp * ep * pp) and 6 % pp == 0
        if fits and 4 % tp == 0 and (2 % tp == 0 or tp % 2 == 0) and 24 % etp == 0 and 8 % ep == 0:
            legal.add(Folding(world=8, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp))
    assert found == legal


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"world": 16, "tp": 3}, ["rule 'tp x cp x pp divides world'", "tp=3", "nearest legal choice: Folding"]),
        ({"world": 16, "ep": 8, "etp": 4}, ["rule 'etp x ep x pp divides world'", "= 32", "nearest"]),
        ({"world": 16, "ep": 0}, ["ep=0", "at least 1"]),
        ({"world": 16, "cp": 2.0}, ["cp=2.0"]),
    ],
)
def test_errors_name_the_rule_and_the_nearest_choice(sizes: dict[str, int], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        Folding(**sizes)
    assert all(word in str(caught.value) for word in words)


def test_the_nearest_choice_changes_least() -> None:
    with pytest.raises(ValueError, match=r"nearest legal choice: Folding\(world=16, tp=4, cp=2, pp=1, ep=1, etp=1\)"):
        Folding(world=16, tp=5, cp=2)
    with pytest.raises(ValueError, match=r"'ep divides num_experts'.*ep=16, num_experts=8; nearest.*ep=8"):
        Folding(world=16, ep=16).check_model(num_experts=8)
    with pytest.raises(ValueError, match="axes is 'ep'"):
        Folding(world=16).attention_groups("ep")
    with pytest.raises(ValueError, match="limits on"):
        list(Folding.enumerate(world=4, dp=1))


def groups_and_meshes(group: dist.ProcessGroup, sizes: dict[str, int]) -> None:
    f = Folding(**sizes)
    groups = f.create_groups()
    rank = dist.get_rank()
    for axes in ("tp", "cp", "dp", "pp", "tp-cp", "etp", "ep", "edp", "etp-ep"):
        mine = next(ranks for ranks in f.groups(axes) if rank in ranks)
        assert dist.get_process_group_ranks(groups[axes]) == mine
    for mesh, axes in ((f.attention_mesh(), ("tp", "cp", "dp", "pp")), (f.moe_mesh(), ("etp", "ep", "edp", "pp"))):
        for axis in axes:
            mine = next(ranks for ranks in f.groups(axis) if rank in ranks)
            assert dist.get_process_group_ranks(mesh.get_group(axis)) == mine


def test_groups_and_meshes_hold_the_same_ranks(pool) -> None:
    pool.run(8, groups_and_meshes, {"world": 8, "tp": 2, "cp": 2, "pp": 2, "ep": 2, "etp": 2})


def in_a_part_of_the_job(group: dist.ProcessGroup) -> list[list[int]]:
    """A folding of four ranks and one of two, where every rank has been in another number of groups before."""
    rank, parts = group.rank(), [[1, 2, 3, 6], [4, 5]]
    made = [dist.new_group(ranks) for ranks in parts]
    mine = next((place for place, ranks in enumerate(parts) if rank in ranks), None)
    if mine is None:
        return []
    f = Folding(world=len(parts[mine]), tp=2, ep=len(parts[mine]))
    for again in (True, True, False):  # torch gives a group of the same ranks the name of one that is gone
        groups = f.create_groups(group=made[mine])
        total = torch.tensor([float(rank)])
        dist.all_reduce(total, group=groups["ep"])
        assert total == sum(parts[mine])
        if again:
            dist.barrier(made[mine])
            for old in set(groups.by_axes.values()):
                dist.destroy_process_group(old)
    mesh = f.moe_mesh(groups=groups)
    assert mesh.get_group("ep") is groups["ep"] and mesh.get_local_rank("ep") == parts[mine].index(rank)
    return [dist.get_process_group_ranks(groups[axes]) for axes in ("tp", "dp", "ep")]


def test_a_folding_lives_in_a_part_of_the_job(pool) -> None:
    found = pool.run(8, in_a_part_of_the_job)
    assert found[0] == found[7] == []
    assert found[1] == [[1, 2], [1, 3], [1, 2, 3, 6]] and found[6] == [[3, 6], [2, 6], [1, 2, 3, 6]]
    assert found[4] == [[4, 5], [4], [4, 5]] and found[5] == [[4, 5], [5], [4, 5]]


def refused_groups(group: dist.ProcessGroup) -> None:
    with pytest.raises(ValueError, match="world=4, but the group has 2 ranks; make them equal"):
        Folding(world=4).create_groups(group=group)
    with pytest.raises(ValueError, match="group is 'ep'; give a ProcessGroup"):
        Folding(world=4).create_groups(group="ep")
    with pytest.raises(ValueError, match="groups are those of Folding"):
        made = Folding(world=2).create_groups(group=group)
        Folding(world=2, tp=2).attention_mesh(groups=made)


def test_groups_that_do_not_fit_are_refused(pool) -> None:
    pool.run(2, refused_groups)


def test_megatron_arguments_name_every_axis() -> None:
    from inspect import signature

    from megatron.core.parallel_state import initialize_model_parallel

    given = Folding(world=16, tp=2, cp=2, pp=2, ep=4).to_megatron()
    assert set(given) <= set(signature(initialize_model_parallel).parameters)
    assert given["expert_model_parallel_size"] == 4 and given["expert_tensor_parallel_size"] == 1

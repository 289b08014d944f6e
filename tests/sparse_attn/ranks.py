"""What the tests over ranks share: one call on one device, the same on every rank, and what must be alike."""

from __future__ import annotations

import torch

import tokenring as tr
from sparse_attn import AnchorConfig, anchor_attention
from sparse_attn.distributed import attend
from tests.oracle import random_qkv
from tokenring.segments import Segment

SMALL = {"theta": 1.5, "block": 8, "step": 4, "dense": "never", "box": 8, "last": 5}


def small(**options) -> AnchorConfig:
    return AnchorConfig(**{**SMALL, **options})


def cut_at(length: int, world: int, cuts: list[int], owners: list[int]) -> tr.Layout:
    """Runs between cuts, each on the rank that `owners` says; ranks may be left out."""
    edges = [0, *cuts, length]
    runs: list[list[Segment]] = [[] for _ in range(world)]
    for owner, a, b in zip(owners, edges, edges[1:]):
        if a < b:
            runs[owner].append(Segment(a, b - a))
    return tr.Layout.from_runs(runs)


def on_rank(group, layout, given, do, options):
    """One rank's results: out, lse, gradients, statistics, and the bytes that left by count and by plan."""
    rank = tr.connect(group).rank
    mine = [x.requires_grad_(do is not None) for x in shards(layout, given, options, rank)]
    with tr.count_traffic(group) as traffic:
        out, lse, stats = attend(*mine, group=group, layout=layout, return_lse=True, return_stats=True, **options)
        gradients = None
        if do is not None:
            out.backward(layout.shard(do, rank))
            gradients = [x.grad for x in mine]
    planned = {}
    for plan in (*stats.plans, *stats.backward_plans):
        plan.check()
        for peer in range(layout.world):
            if plan.bytes_sent(rank, peer):
                planned[(rank, peer)] = planned.get((rank, peer), 0) + plan.bytes_sent(rank, peer)
    return out.detach(), lse, gradients, stats, traffic.sent, planned


def shards(layout, given, options, rank):
    """One rank's rows of q, k and v."""
    keys = options.get("kv_layout") or layout
    return [cut.shard(x, rank) for cut, x in zip((layout, keys, keys), given)]


def assert_equals_one_device(
    results, layout: tr.Layout, given, do, options, tolerance: float = 1e-12, bytes_too: bool = True
) -> None:
    """Rows of the one-device result, its gradients and its columns; counted bytes as planned."""
    whole = [x.clone().requires_grad_(do is not None) for x in given]
    told = {name: value for name, value in options.items() if name != "kv_layout"}
    out, lse, stats = anchor_attention(*whole, return_lse=True, return_stats=True, **told)
    if do is not None:
        out.backward(do)
    close = {"atol": tolerance, "rtol": 0}
    for rank, (mine, mine_lse, gradients, mine_stats, sent, planned) in enumerate(results):
        torch.testing.assert_close(mine, layout.shard(out.detach(), rank), **close)
        torch.testing.assert_close(mine_lse, layout.shard(lse.detach(), rank, 2), **close)
        expected = shards(layout, [x.grad for x in whole], options, rank) if do is not None else ()
        for grad, own in zip(gradients or (), expected):
            torch.testing.assert_close(grad, own, atol=10 * tolerance, rtol=0)
        assert sent == planned or not bytes_too
        assert abs(mine_stats.density - stats.density) < 1e-12
        assert abs(mine_stats.stripe_density - stats.stripe_density) < 1e-12
        if stats.path == "sparse":
            assert_same_columns(mine_stats.plan, stats.plan)


def assert_same_columns(mine, whole) -> None:
    """A rank's lists name the positions that one device keeps for the same group."""
    for number, part in enumerate(mine.geometry.groups):
        group = next(
            n for n, g in enumerate(whole.geometry.groups) if g.diagonal <= part.diagonal < g.diagonal + g.count
        )
        for entry in range(whole.batch):
            for head in range(whole.heads):
                assert torch.equal(mine.columns(number, entry, head), whole.columns(group, entry, head))


def random(
    length: int, *, batch: int = 1, heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (16, 16), seed: int = 0
):
    return random_qkv(batch, length, *heads, dims[0], torch.float64, v_dim=dims[1], seed=seed)


def run(world: int, layout: tr.Layout, given, do=None, **options):
    return tr.run_local(world, on_rank, layout, given, do, options)

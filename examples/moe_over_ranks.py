"""A mixture-of-experts layer over ranks under a folding: the same result as on one rank, and the bytes the formulas say.

torchrun --standalone --nproc-per-node 4 examples/moe_over_ranks.py
"""

import torch
import torch.distributed as dist

import moe

HIDDEN, FFN, EXPERTS, TOPK, TOKENS = 64, 128, 16, 4, 50


def build(**groups: object) -> moe.MoELayer:
    """The same weights on every rank, each keeping its own experts."""
    layer = moe.MoELayer(HIDDEN, FFN, EXPERTS, TOPK, dispatcher="dedup", **groups)
    draw = torch.Generator().manual_seed(0)
    layer.router.weight.data = torch.randn(EXPERTS, HIDDEN, generator=draw)
    up, gate, down = (
        0.2 * torch.randn(EXPERTS, *s, generator=draw) for s in ((HIDDEN, FFN), (HIDDEN, FFN), (FFN, HIDDEN))
    )
    first = layer.dispatcher.first_expert
    mine = slice(first, first + layer.dispatcher.local_experts)
    layer.experts.load(up[mine], down[mine], gate[mine])
    return layer


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    folding = moe.Folding(world=world, tp=2, ep=world)  # EP over all ranks, though DP is only half of them
    groups = folding.create_groups()
    layer = build(ep_group=groups["ep"], etp_group=groups["etp"])

    tokens = torch.randn(TOKENS + 10 * rank, HIDDEN, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad(), layer.dispatcher.count_traffic() as counted:
        out = layer(tokens)
        difference = (out - build()(tokens)).abs().max().item()
        ids = [None] * world
        dist.all_gather_object(ids, layer.router(tokens).expert_ids)
    sizes = {"num_experts": EXPERTS, "topk": TOPK, "ep": world, "tokens": 0, "row_bytes": 4 * HIDDEN, "routing": ids}
    there, home = (moe.traffic("dedup", direction=way, **sizes) for way in ("dispatch", "combine"))
    copies = moe.traffic("alltoall", **sizes)
    planned = sum(size for plan in (there, home) for (source, _), size in plan.items() if source == rank)
    assert sum(counted.rows.values()) == planned and difference < 1e-4
    if rank == 0:
        print(folding.describe(ranks_per_node=2))
        print(f"largest difference {difference:.1e}: as one rank computes it alone")
        share = sum(there.values()) / sum(copies.values())
        print(
            f"rank 0 sent {planned} bytes of rows, as planned; a copy for each expert would be {1 / share:.2f} times as much"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

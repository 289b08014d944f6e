"""Exact attention over any number of ranks, compared with one rank, and what was sent compared with the plan.

torchrun --standalone --nproc-per-node 3 examples/attention_over_ranks.py
"""

import torch
import torch.distributed as dist

import tokenring as tr

LENGTH, HEADS, KV_HEADS, DIM = 1001, 8, 2, 64  # no length needs to divide by anything


def main() -> None:
    dist.init_process_group("gloo")
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, LENGTH, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))

    layout = tr.Layout.zigzag(LENGTH, world)
    mine = [layout.shard(x, rank) for x in (q, k, v)]
    for schedule in ("ring", "tokenring", "gather"):
        shape = tr.AttentionShape(1, LENGTH, LENGTH, HEADS, KV_HEADS, DIM, dtype=torch.float32)
        plan = tr.plan(schedule, world=world, shape=shape, layout=layout)
        plan.check()
        with torch.no_grad(), tr.count_traffic(group) as traffic:
            out = tr.attention(*mine, group=group, plan=plan)
        difference = (layout.gather(out, group) - tr.attention(q, k, v)).abs().max().item()
        sent = sum(traffic.sent.values())
        assert sent == plan.bytes_sent(rank)
        if rank == 0:
            print(f"{schedule:10} largest difference {difference:.1e}, rank 0 sent {sent} bytes, as planned")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

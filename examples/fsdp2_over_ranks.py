"""A small transformer trained with FSDP2 and attention over ranks, compared step by step with one process and the whole batch.

    torchrun --standalone --nproc-per-node 4 examples/fsdp2_over_ranks.py

              cp 0                cp 1              dp: other sequences     cp: other rows of the same sequences
    dp 0   rank 0: 0..1, zigzag   rank 1: 0..1      parameters are sharded over all four ranks
    dp 1   rank 2: 2..3, zigzag   rank 3: 2..3

Who sums what: `cross_entropy` over all ranks divides by the tokens of all ranks, and its gradient is that of this rank's own
tokens. So parameter gradients are to be *summed* over all ranks, and FSDP2, which averages, is told to divide by 1.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import rms_norm, silu
from torch.utils.checkpoint import checkpoint

import tokenring as tr
from tokenring.checkpoint import save_attention

VOCABULARY, DIM, HEADS, KV_HEADS, LAYERS = 64, 64, 4, 2, 2
BATCH, LENGTH, STEPS = 4, 61, 12  # the length needs to divide by nothing


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dim = DIM // HEADS
        self.qkv = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * self.dim, bias=False)
        self.mix = nn.Linear(DIM, DIM, bias=False)
        self.up = nn.Linear(DIM, 2 * DIM, bias=False)
        self.down = nn.Linear(2 * DIM, DIM, bias=False)

    def forward(self, x: Tensor, plan: tr.Plan, group: DeviceMesh | None) -> Tensor:
        # All is recomputed in the backward pass but attention, so nothing is sent twice.
        return checkpoint(self.body, x, plan, group, use_reentrant=False, context_fn=save_attention)

    def body(self, x: Tensor, plan: tr.Plan, group: DeviceMesh | None) -> Tensor:
        heads = self.qkv(rms_norm(x, (DIM,))).unflatten(-1, (-1, self.dim))
        out = tr.attention(*heads.split([HEADS, KV_HEADS, KV_HEADS], dim=2), group=group, plan=plan)
        x = x + self.mix(out.flatten(2))
        return x + self.down(silu(self.up(rms_norm(x, (DIM,)))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, DIM), nn.Embedding(LENGTH, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, layout: tr.Layout, rank: int, group: DeviceMesh | None) -> Tensor:
        x = self.tokens(tokens) + self.positions(layout.positions(rank))
        shape = tr.AttentionShape(len(tokens), LENGTH, LENGTH, HEADS, KV_HEADS, DIM // HEADS, dtype=x.dtype)
        plan = tr.plan("auto", world=layout.world, shape=shape, layout=layout)  # one for all layers
        for block in self.blocks:
            x = block(x, plan, group)
        return self.head(rms_norm(x, (DIM,)))


def train(mesh: DeviceMesh | None) -> list[float]:
    """The loss of every step: on this rank's share of rows and sequences, or alone on all of them."""
    torch.manual_seed(0)  # the same parameters on every rank, before they are sharded
    model = Model()
    rows, everyone = (None, None) if mesh is None else (mesh["cp"], init_device_mesh("cpu", (mesh.size(),)))
    if everyone is not None:
        for part in (*model.blocks, model):
            fully_shard(part, mesh=everyone)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo cannot average
    replica, replicas = (0, 1) if mesh is None else (mesh["dp"].get_local_rank(), mesh["dp"].size())
    rank, world = (0, 1) if rows is None else (rows.get_local_rank(), rows.size())
    layout = tr.Layout.zigzag(LENGTH, world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    data, losses = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        start, stride = torch.randint(1, 6, (2, BATCH, 1), generator=data)
        batch = (
            start + stride * torch.arange(LENGTH)
        ) % VOCABULARY  # counts up by a number of its own in each sequence
        mine = batch.chunk(replicas)[replica]
        logits = model(layout.shard(mine, rank), layout, rank, rows)
        loss = tr.cross_entropy(logits, layout.shard_labels(mine, rank), everyone)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "cp"))
    losses, alone = train(mesh), train(None)
    difference = max(abs(a - b) for a, b in zip(losses, alone))
    if dist.get_rank() == 0:
        print("loss over ranks  ", " ".join(f"{loss:.6f}" for loss in losses))
        print("loss of one rank ", " ".join(f"{loss:.6f}" for loss in alone))
    assert difference < 2e-5 and alone[-1] < alone[0], difference
    if dist.get_rank() == 0:
        print(f"the same curve: largest difference {difference:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Megatron-Core trains a GPT model whose sequences are spread over ranks; Megatron itself is not changed.

    torchrun --standalone --nproc-per-node 2 examples/megatron_over_ranks.py

Megatron's own training scripts need these flags more; `--cp-comm-type` takes any schedule's name:

    torchrun ... pretrain_gpt.py --context-parallel-size 8 --attention-dropout 0 --no-create-attention-mask-in-dataloader \\
        --spec tokenring.integrations.megatron gpt_layer_te_spec --cp-comm-type tokenring
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from tokenring import Layout
from tokenring.integrations.megatron import with_tokenring

LENGTH, VOCAB = 96, 64


def build(context_parallel_size: int) -> GPTModel:
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=4,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        context_parallel_size=context_parallel_size,
        bias_dropout_fusion=False,
        use_cpu_initialization=True,
    )
    spec = with_tokenring(get_gpt_layer_local_spec(), schedule="tokenring")
    return GPTModel(config, spec, VOCAB, LENGTH, position_embedding_type="learned_absolute")


def train(model: GPTModel, batch: dict[str, torch.Tensor], group: dist.ProcessGroup | None) -> list[float]:
    """Three steps; loss and gradients are sums over the ranks of `group`, each of which holds a part of every sequence."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(3):
        loss = model(batch["tokens"], batch["positions"], None, labels=batch["labels"]).sum() / batch["labels"].shape[0]
        (loss / LENGTH).backward()
        for value in [loss.detach(), *(p.grad for p in model.parameters())] if group else ():
            dist.all_reduce(value, group=group)
        losses.append(float(loss.detach()) / LENGTH)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def main() -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    group = parallel_state.get_context_parallel_group()
    tokens = torch.randint(0, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).expand(2, -1)
    batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "positions": positions}

    cut = Layout.zigzag(LENGTH, group.size())  # as Megatron's data loaders cut a sequence
    spread = train(build(group.size()), {name: cut.shard(x, group.rank()) for name, x in batch.items()}, group)
    alone = train(build(1), batch, None)
    assert max(abs(a - b) for a, b in zip(spread, alone)) < 1e-5, (spread, alone)
    if dist.get_rank() == 0:
        print(f"{group.size()} ranks: losses {[round(loss, 5) for loss in spread]}, as one rank alone")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

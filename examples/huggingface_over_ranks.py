"""A transformers language model whose prompt and cache are spread over ranks; the model itself is not changed.

    torchrun --standalone --nproc-per-node 2 examples/huggingface_over_ranks.py [MODEL_DIRECTORY]

Without a directory a tiny model of random weights stands in.
"""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tokenring import Layout
from tokenring.integrations.huggingface import SpreadCache, sequence_parallel


def load() -> torch.nn.Module:
    if len(sys.argv) > 1:
        return AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True).eval()
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).eval()


@torch.inference_mode()
def main() -> None:
    dist.init_process_group("gloo")
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    model = load()
    prompt = torch.arange(3, 120)[None]
    layout = Layout.zigzag(prompt.shape[1], world)
    positions = torch.arange(prompt.shape[1])[None]

    written: list[int] = []
    with sequence_parallel(model, group, layout, schedule="tokenring"):
        cache = SpreadCache(layout, group)
        out = model(
            input_ids=layout.shard(prompt, rank), position_ids=layout.shard(positions, rank), past_key_values=cache
        )
        logits = layout.gather(out.logits, group)[:, -1]
        for step in range(8):
            token = logits.argmax(-1, keepdim=True)
            written.append(int(token))
            at = torch.tensor([[prompt.shape[1] + step]])
            logits = model(input_ids=token, position_ids=at, past_key_values=cache).logits[:, -1]

    alone = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert written == alone, (written, alone)
    if rank == 0:
        print(f"{world} ranks wrote {written}, as one rank does; rows of the cache per rank: {cache.rows()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

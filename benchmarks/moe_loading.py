"""Memory and time of one rank of four that reads a mixture-of-experts model: all experts and then its own, or its own only.

    python -m benchmarks.moe_loading [--ranks 4] [--out benchmarks/results/moe_loading.json]

The model is a Mixtral of random weights, made for this in a temporary folder. Each way runs in a process of its own. Memory is
what reading adds at most to the resident set, pages of the files that lie in memory included, and what of it stays.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks.moe_dispatch import peak_bytes
from benchmarks.record import measured

SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_local_experts": 16}
REST = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 512, "num_experts_per_tok": 2}


def read(_: int, way: str, folder: str, ranks: int, result: str) -> None:
    """One rank: read, and keep its own."""
    from transformers import AutoModelForCausalLM

    from moe.integrations.huggingface import expert_modules
    from moe.integrations.huggingface_loading import OwnExperts, load_own_experts

    own = OwnExperts(ranks - 1, ranks)
    load_own_experts(AutoModelForCausalLM, folder, own, dtype=torch.float32)  # imports and caches
    before, start = peak_bytes(reset=True), time.perf_counter()
    if way == "own":
        model, _ = load_own_experts(AutoModelForCausalLM, folder, own, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for module in expert_modules(model).values():
            mine = own.of(module.num_experts)
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(p.detach()[mine.start : mine.stop].clone()))
    seconds, peak = time.perf_counter() - start, peak_bytes(reset=False) - before
    kept = sum(p.nbytes for p in model.parameters())
    Path(result).write_text(json.dumps({"seconds": seconds, "peak_bytes": peak, "parameter_bytes": kept}))


def main() -> None:
    """Make the model, read it both ways, print, write."""
    from transformers import MixtralConfig, MixtralForCausalLM

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--out")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = MixtralForCausalLM(MixtralConfig(**SIZES, **REST))
        whole = sum(p.nbytes for p in model.parameters())
        model.save_pretrained(folder)
        del model
        for way in ("whole", "own"):
            result = f"{folder}/{way}.json"
            mp.spawn(read, args=(way, folder, options.ranks, result), nprocs=1)
            found[way] = json.loads(Path(result).read_text())
    print(f"the model: {whole / 2**20:.0f} MiB; rank {options.ranks - 1} of {options.ranks}")
    for way, row in found.items():
        print(
            f"{way:<6} peak {row['peak_bytes'] / 2**20:6.0f} MiB, stays {row['parameter_bytes'] / 2**20:6.0f} MiB, "
            f"{row['seconds']:.2f} s"
        )
    if options.out:
        sizes = SIZES | REST | {"ranks": options.ranks, "model_bytes": whole}
        Path(options.out).write_text(json.dumps(measured() | {"sizes": sizes, "ways": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

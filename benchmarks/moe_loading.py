"""Memory and time of one rank of four that reads a mixture-of-experts model: more than it keeps, or what it keeps only.

    python -m benchmarks.moe_loading [--ranks 4] [--etp 2] [--out benchmarks/results/moe_loading.json]

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

from benchmarks import record
from benchmarks.moe_dispatch import peak_bytes

SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_local_experts": 16}
REST = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 512, "num_experts_per_tok": 2}
WAYS = {
    "EP, whole model": "all experts, then its own are kept",
    "EP": "its own experts only",
    "EP x ETP, whole experts": "its own experts, then its part of each is kept",
    "EP x ETP": "its part of its own experts only",
}


def read(_: int, way: str, folder: str, ranks: int, etp: int, result: str) -> None:
    """The last rank: read, and keep its own."""
    from transformers import AutoModelForCausalLM

    from moe.integrations.huggingface import expert_modules
    from moe.integrations.huggingface_loading import OwnExperts, load_own_experts
    from moe.integrations.huggingface_parts import part_of_experts

    cut = etp if way.startswith("EP x ETP") else 1
    experts = OwnExperts(ranks // cut - 1, ranks // cut)
    own = OwnExperts(experts.part, experts.parts, cut - 1, cut)

    def load(which: OwnExperts | None) -> torch.nn.Module:
        if which is None:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return load_own_experts(AutoModelForCausalLM, folder, which, dtype=torch.float32)[0]

    load(own)  # imports and caches
    before, start = peak_bytes(reset=True), time.perf_counter()
    model = load({"EP, whole model": None, "EP x ETP, whole experts": experts}.get(way, own))
    if "whole" in way:
        for module in expert_modules(model).values():
            mine = own.of(SIZES["num_local_experts"]) if way == "EP, whole model" else range(module.num_experts)
            for name, p in list(module.named_parameters(recurse=False)):
                kept = part_of_experts(module, name, p.detach()[mine.start : mine.stop], cut, cut - 1)
                setattr(module, name, torch.nn.Parameter(kept.clone()))
    seconds, peak = time.perf_counter() - start, peak_bytes(reset=False) - before
    stays = sum(p.nbytes for p in model.parameters())
    Path(result).write_text(json.dumps({"seconds": seconds, "peak_bytes": peak, "parameter_bytes": stays}))


def main() -> None:
    """Make the model, read it every way, print, write."""
    from transformers import MixtralConfig, MixtralForCausalLM

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--etp", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = MixtralForCausalLM(MixtralConfig(**SIZES, **REST))
        whole = sum(p.nbytes for p in model.parameters())
        model.save_pretrained(folder)
        del model
        for way, reads in WAYS.items():
            result = f"{folder}/result.json"
            mp.spawn(read, args=(way, folder, options.ranks, options.etp, result), nprocs=1)
            rows.append({"way": way, "reads": reads} | json.loads(Path(result).read_text()))
    print(
        f"the model: {whole / 2**20:.0f} MiB; the last of {options.ranks} ranks, ETP {options.etp} where there is one"
    )
    for row in rows:
        print(
            f"{row['way']:<25} peak {row['peak_bytes'] / 2**20:6.0f} MiB, stays {row['parameter_bytes'] / 2**20:6.0f} MiB, "
            f"{row['seconds']:.2f} s"
        )
    if options.out:
        sizes = SIZES | REST | {"ranks": options.ranks, "etp": options.etp, "model_bytes": whole}
        record.write(options.out, "one rank reads a mixture of experts: memory it adds and time", rows, sizes=sizes)


if __name__ == "__main__":
    main()

"""What sparse prefill costs a real language model: SmolLM2-135M on real text, every method at its own settings.

    python benchmarks/sparse_attention_quality.py sweep  --length 4096     loss, KL, top-1 against density, method by method
    python benchmarks/sparse_attention_quality.py tuned  --length 8192     thetas for a loss, found on one text, tried on another
    python benchmarks/sparse_attention_quality.py needle --length 2048     a sentence hidden at 10 depths: dense's answer, and ours

Texts are the Python language reference and modules' sources, both part of any Python. The model is the demo's (`make setup`).
Prints one table; --out FILE also writes JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
import pydoc_data.topics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.assets import demo_dir
from sparse_attn import AnchorConfig, TunedConfig, baselines, compare_logits, execute, tune
from sparse_attn.integrations.huggingface import sparse_prefill

SWEEPS: dict[str, tuple[float, ...]] = {
    "rescore": (1.0, 2.0, 3.0, 4.0),
    "every": (2.0,),
    "lse": (6.0, 8.0, 10.0),
    "pooled": (4.0, 6.0, 8.0, 10.0),
}
BASELINES: dict[str, list[dict[str, Any]]] = {
    "streaming": [{"initial": 128, "local": 512}, {"initial": 128, "local": 1024}],
    "vertical_slash": [{"vertical": 200, "slash": 300}, {"vertical": 400, "slash": 800}],
    "flexprefill": [{"gamma": 0.8, "min_budget": 256}, {"gamma": 0.9, "min_budget": 512}],
    "xattention": [{"threshold": 0.7}, {"threshold": 0.9}],
    "flashprefill": [{"alpha": 0.3}, {"alpha": 0.1}],
}
CHUNK = 512


class Model:
    """SmolLM2 and its tokenizer; `config`: what its configuration is to say instead."""

    def __init__(self, **config: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = demo_dir() / "smollm2"
        self.tokens = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config).eval()

    def ids(self, name: str, length: int) -> Tensor:
        """(1, length) token ids of a text."""
        text = "\n".join(pydoc_data.topics.topics.values()) if name == "reference" else _sources()
        return self.tokens(text, return_tensors="pt", truncation=True, max_length=length).input_ids

    def hidden(self, ids: Tensor) -> Tensor:
        return self.model.model(ids).last_hidden_state[0]

    def compared(self, hidden: Tensor, dense: Tensor, ids: Tensor) -> dict[str, float]:
        """Loss difference, KL and top-1, some rows' logits at a time."""
        total, count = {"nll": 0.0, "kl": 0.0, "top1": 0.0}, ids.shape[1] - 1
        for first in range(0, count, CHUNK):
            stop = min(first + CHUNK, count)
            logits = (self.model.lm_head(x[first : stop + 1]) for x in (hidden, dense))
            found = compare_logits(*logits, ids[0, first : stop + 1])
            for name in total:
                total[name] += getattr(found, name) * (stop - first) / count
        return total


def _sources() -> str:
    return "\n".join(inspect.getsource(module) for module in (argparse, inspect))


@contextmanager
def with_plans(model: torch.nn.Module, make: Any) -> Iterator[list[float]]:
    """Attention under `make(q, k)`'s plans; yields the densities, a layer each."""
    from transformers import AttentionInterface

    densities: list[float] = []

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        plan = make(q, k)
        densities.append(plan.density)
        return execute(plan, q, k, v, scale=scaling), None

    AttentionInterface.register("with_plans", attend)
    former = model.config._attn_implementation
    model.set_attn_implementation("with_plans")
    yield densities
    model.set_attn_implementation(former)


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def sweep(model: Model, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method and setting on one text."""
    ids = model.ids(args.text, args.length)
    dense, rows = model.hidden(ids), []
    for name in args.methods or [*SWEEPS, *BASELINES]:
        for setting in SWEEPS.get(name) or BASELINES[name]:
            if name in SWEEPS:
                config = AnchorConfig(identify=name, theta=setting, dense="never", block=args.block, step=args.step)
                with sparse_prefill(model.model, config) as calls:
                    hidden = model.hidden(ids)
                density = mean(c.density for c in calls.values())
            else:
                with with_plans(model.model, lambda q, k: getattr(baselines, name)(q, k, **setting)) as densities:  # noqa: B023
                    hidden = model.hidden(ids)
                density = mean(densities)
            rows.append(
                {"method": name, "setting": str(setting), "density": density} | model.compared(hidden, dense, ids)
            )
            print_row(rows[-1])
    return rows


def tuned(model: Model, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Thetas per layer and head for a recall, found on one text; what they cost on it and on another."""
    samples: dict[int, tuple[Tensor, Tensor]] = {}
    with with_recording(model.model, samples):
        model.hidden(model.ids("reference", args.length))
    rows = []
    for target in args.recalls:
        found = tune([samples], target=target, config=AnchorConfig(dense="never", block=args.block, step=args.step))
        if args.save:
            found.save(args.save)
        for text in ("reference", "sources"):
            ids = model.ids(text, args.length)
            dense = model.hidden(ids)
            with sparse_prefill(model.model, found) as calls:
                hidden = model.hidden(ids)
            row = {
                "method": f"tuned for recall {target}",
                "setting": text,
                "density": mean(c.density for c in calls.values()),
            }
            rows.append(row | model.compared(hidden, dense, ids))
            print_row(rows[-1])
    return rows


@contextmanager
def with_recording(model: torch.nn.Module, samples: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Dense attention that keeps each layer's queries and keys."""
    from transformers import AttentionInterface

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        samples[module.layer_idx] = q.clone(), k.clone()
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("recording", attend)
    former = model.config._attn_implementation
    model.set_attn_implementation("recording")
    yield
    model.set_attn_implementation(former)


def needle(model: Model, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A sentence at 10 depths of a text, and what dense and sparse prefill make of a question about it."""
    config: AnchorConfig | TunedConfig = AnchorConfig(theta=args.theta, dense="never", block=args.block, step=args.step)
    config = TunedConfig.load(args.load) if args.load else config
    hay = model.ids("reference", args.length)[0].tolist()
    hidden = model.tokens("\nThe secret code of the blue house is 48213.\n").input_ids
    question = model.tokens(
        "\nQuestion: what is the secret code of the blue house?\nAnswer: The secret code of the blue house is"
    ).input_ids
    rows = []
    for depth in range(10):
        at = len(hay) * depth // 10
        ids = torch.tensor([hay[:at] + hidden + hay[at:] + question])
        options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        dense = model.model.generate(ids, **options)[0, ids.shape[1] :]
        with sparse_prefill(model.model, config) as calls:
            sparse = model.model.generate(ids, **options)[0, ids.shape[1] :]
        said = [model.tokens.decode(x) for x in (dense, sparse)]
        rows.append(
            {
                "depth": depth / 10,
                "dense": said[0],
                "sparse": said[1],
                "same": bool((dense == sparse).all()),
                "density": mean(c.density for c in calls.values()),
            }
        )
        print(rows[-1], flush=True)
    print(
        f"same answer at {sum(r['same'] for r in rows)} of 10 depths; dense finds it at {sum('48213' in r['dense'] for r in rows)}"
    )
    return rows


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    costs = f"loss {row['nll']:+.4f}  KL {row['kl']:.4f}  top-1 {row['top1']:.4f}"
    print(f"{row['method']:>24} {row['setting']:>40}  density {row['density']:.3f}  {costs}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sweep", "tuned", "needle"))
    parser.add_argument("--length", type=int, default=4096, help="tokens of the text")
    parser.add_argument("--text", choices=("reference", "sources"), default="reference")
    parser.add_argument("--methods", nargs="*", help="of the sweep; all where not given")
    parser.add_argument("--block", type=lambda s: s if s == "auto" else int(s), default="auto")
    parser.add_argument("--step", type=lambda s: s if s == "auto" else int(s), default="auto")
    parser.add_argument("--recalls", type=float, nargs="*", default=[0.97, 0.98, 0.99])
    parser.add_argument("--theta", type=float, default=2.0)
    parser.add_argument("--save", help="write the last tuned thetas here")
    parser.add_argument("--load", help="needle: use tuned thetas")
    parser.add_argument("--out", type=Path, help="write JSON")
    args = parser.parse_args()
    with torch.inference_mode():
        rows = {"sweep": sweep, "tuned": tuned, "needle": needle}[args.what](Model(), args)
    if args.out:
        told = {
            "what": args.what,
            "length": args.length,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        args.out.write_text(json.dumps(told | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

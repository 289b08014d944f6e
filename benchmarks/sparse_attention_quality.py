"""What sparse prefill costs a real language model: SmolLM2-135M on real text, every method at its own settings.

    python benchmarks/sparse_attention_quality.py all        all of the below, each into its own file of benchmarks/results
    python benchmarks/sparse_attention_quality.py equal      rescore beside pooled at equal density, 4,096 and 8,192 tokens
    python benchmarks/sparse_attention_quality.py tuned      thetas by layer and head from one text, tried on another, 8,192 tokens
    python benchmarks/sparse_attention_quality.py needle     a sentence hidden at 10 depths: dense's answer, and ours
    python benchmarks/sparse_attention_quality.py sweep      every method and baseline at equal loss, 4,096 tokens: density and CPU time

Loss is nats a token above the same model with dense attention on the same text. Each figure is one run: the numbers do not
depend on the machine, but for rounding. `--results DIR` writes JSON after every figure; a run that was broken off goes on from
there at the same commit.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.language_model import TEXTS, Model, dense_attention, with_attention, with_recording
from benchmarks.record import Table
from benchmarks.sparse_needle import needle
from benchmarks.sparse_sweep import sweep
from sparse_attn import AnchorConfig, TunedConfig, Tuner
from sparse_attn.integrations.huggingface import sparse_prefill

__all__ = ["Model", "with_recording"]

EQUAL = {"rescore": (4.0, 6.0), "pooled": (6.0,)}
Row = dict[str, Any]


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def of_config(model: Model, config: AnchorConfig | TunedConfig, text: str, length: int, place: Row) -> Row:
    """Density and costs of one configuration on one text."""
    ids, dense = model.ids(text, length), model.dense(text, length)
    with sparse_prefill(model.model, config) as calls:
        hidden = model.hidden(ids)
    densities = [stats.density for _, stats in sorted(calls.items())]
    named = place | {"text": text, "length": length, "density": mean(densities), "densities": densities}
    return shown(named | model.compared(hidden, dense, ids))


def anchor(name: str, theta: float, args: argparse.Namespace) -> AnchorConfig:
    return AnchorConfig(identify=name, theta=theta, dense="never", block=args.block, step=args.step)


def equal(model: Model, args: argparse.Namespace, table: Table) -> Row:
    """`rescore` at two thetas around the density of `pooled` at one, and the loss of `rescore` at that density."""
    found = []
    for length in args.lengths:
        here = []
        for name, thetas in EQUAL.items():
            for theta in thetas:
                place, config = {"method": name, "setting": {"theta": theta}}, anchor(name, theta, args)
                where = {"text": args.text, "length": length}
                here.append(table.row(place | where, lambda: of_config(model, config, **where, place=place)))  # noqa: B023
        ours = [row for row in here if row["method"] == "rescore"]
        found += [at_equal_density(ours, row) for row in here if row["method"] == "pooled"]
        print(found[-1], flush=True)
    return {"at equal density": found}


def at_equal_density(ours: list[Row], theirs: Row) -> Row:
    """Our loss where we are as dense as they are: between the two measured points, straight in the logarithms of both.

    Outside the measured densities the nearest point stands in if it is no denser, which can only flatter them.
    """
    ours, density = sorted(ours, key=lambda row: row["density"]), theirs["density"]
    named = {"length": theirs["length"], "density": density, "pooled": theirs["nll"]}
    sparser = [row for row in ours if row["density"] <= density]
    denser = [row for row in ours if row["density"] > density]
    if not sparser:
        low, denser_by = denser[0], denser[0]["density"] / density
        told = {"rescore": low["nll"], "how": f"not reached: rescore's sparsest is {denser_by:.2f} times as dense"}
    elif not denser:
        told = {"rescore": sparser[-1]["nll"], "how": f"measured at density {sparser[-1]['density']:.3f}"}
    else:
        low, high = sparser[-1], denser[0]
        part = math.log(density / low["density"]) / math.log(high["density"] / low["density"])
        logs = [math.log(max(row["nll"], 1e-6)) for row in (low, high)]
        told = {"rescore": math.exp(logs[0] + part * (logs[1] - logs[0])), "how": "between two measured densities"}
    return named | told | {"rescore/pooled": told["rescore"] / theirs["nll"]}


def tuned(model: Model, args: argparse.Namespace, table: Table) -> Row:
    """Thetas by layer and head, found on one text of 4,096 tokens, tried on another of 8,192; one theta for all beside them."""
    tuner = Tuner(AnchorConfig(dense="never", block=args.block, step=args.step), groups=4)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        tuner.watch(layer, q, k, scale)
        return dense_attention(q, k, v, scale)

    def found(density: float) -> Row:
        if not tuner.seen:
            with with_attention(model.model, attend):
                model.hidden(model.ids("sources", args.tune_length))
        config = tuner.tune(target=density, metric="density")
        if args.save:
            config.save(args.save)
        thetas = {str(number): layer.theta for number, layer in config.layers.items()}
        return tried(config, {"method": "tuned", "setting": {"density asked": density}}) | {"thetas": thetas}

    def tried(config: AnchorConfig | TunedConfig, place: Row) -> Row:
        return of_config(model, config, "reference", args.tried_length, place)

    for density in args.densities:
        table.row({"method": "tuned", "setting": {"density asked": density}}, lambda: found(density))  # noqa: B023
    for theta in args.thetas:
        place = {"method": "one theta", "setting": {"theta": theta}}
        table.row(place, lambda: tried(anchor("rescore", theta, args), place))  # noqa: B023
    return {"tuned on": {"text": "sources", "length": args.tune_length}}


def needles(model: Model, args: argparse.Namespace, table: Table) -> Row:
    """A sentence at 10 depths, and what dense and sparse prefill make of a question about it."""
    configs: dict[str, AnchorConfig | TunedConfig] = {
        f"theta {t:g}": anchor("rescore", t, args) for t in args.needle_thetas
    }
    if args.load:
        configs["tuned"] = TunedConfig.load(args.load)
    for length in args.needle_length:
        table.row({"length": length}, lambda: needle(model, length, configs))  # noqa: B023
    return {}


def shown(row: Row) -> Row:
    """Print a row; gives it back."""
    costs = f"loss {row['nll']:+.4f}  KL {row['kl']:.4f}  top-1 {row['top1']:.4f}"
    where = f"{row['text']} {row['length']}"
    print(f"{row['method']:>16} {row['setting']!s:>36} {where:>16} density {row['density']:.3f}  {costs}", flush=True)
    return row


STEPS = {"equal": equal, "tuned": tuned, "needle": needles, "sweep": sweep}


def asked(name: str, args: argparse.Namespace) -> str:
    """The question of a step in words: rows of a file that answers another one are not taken up."""
    said = {
        "equal": "rescore beside pooled at equal density",
        "tuned": f"thetas by layer and head from {args.tune_length} tokens of sources, tried on {args.tried_length} of reference",
        "needle": f"a sentence hidden at ten depths; thetas {args.needle_thetas}",
        "sweep": f"every method at its settings, {args.length} tokens of {args.text}",
    }
    return f"SmolLM2-135M, {said[name]}; block {args.block}, step {args.step}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*STEPS, "all"))
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 8192], help="of equal")
    parser.add_argument("--length", type=int, default=4096, help="of sweep")
    parser.add_argument("--needle-length", type=int, nargs="*", default=[4096, 8192], help="tokens of the whole prompt")
    parser.add_argument("--tune-length", type=int, default=4096)
    parser.add_argument("--tried-length", type=int, default=8192)
    parser.add_argument("--densities", type=float, nargs="*", default=[0.2], help="of tuned")
    parser.add_argument("--thetas", type=float, nargs="*", default=[], help="tuned: one for all layers and heads")
    parser.add_argument("--save", help="tuned: write the last thetas here")
    parser.add_argument("--text", choices=TEXTS, default="reference")
    parser.add_argument("--methods", nargs="*", help="of the sweep; all where not given")
    parser.add_argument("--block", type=lambda s: s if s == "auto" else int(s), default="auto")
    parser.add_argument("--step", type=lambda s: s if s == "auto" else int(s), default="auto")
    parser.add_argument("--needle-thetas", type=float, nargs="*", default=[6.0])
    parser.add_argument("--load", help="needle: use tuned thetas")
    parser.add_argument("--results", type=Path, help="folder for JSON; `all` writes into benchmarks/results")
    args = parser.parse_args()
    results = args.results or (Path(__file__).parent / "results" if args.what == "all" else None)
    model = Model()
    for name in STEPS if args.what == "all" else (args.what,):
        table = Table(results and results / f"sparse_quality_{name}.json", asked(name, args))
        with torch.inference_mode():
            told = STEPS[name](model, args, table)
        table.write(threads=torch.get_num_threads(), **told)


if __name__ == "__main__":
    main()

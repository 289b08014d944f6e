"""What overlap gains: a mixture-of-experts layer over a link of a set rate, its tokens whole or in parts, shared experts after or beside.

    python -m benchmarks.moe_overlap [--mbit 100 200 400] [--out benchmarks/results/moe_overlap.json]        (root, Linux)

Two ranks in network namespaces (`benchmarks.linklab`), one core each, so that computing and the exchange do not share a processor
as they do over loopback. Forward and backward; variants take turns; medians of the slowest rank.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import record
from benchmarks.linklab.crew import hire
from benchmarks.linklab.jobs import Span, seconds, turns
from benchmarks.linklab.lab import build
from benchmarks.linklab.wiring import wire
from moe import MoELayer, SharedExperts

TOKENS, HIDDEN, FFN, EXPERTS, TOPK, SHARED = 1024, 256, 512, 8, 4, 2048
VARIANTS = {"shared after": 1, "shared beside": 1, "beside, 2 parts": 2, "beside, 4 parts": 4, "beside, 8 parts": 8}


def variants(rank: int, world: int, repeat: int) -> list[list[Span]]:
    """Spans of every variant; all compute the same, which is checked."""
    torch.manual_seed(0)
    shared = SharedExperts(HIDDEN, SHARED)
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(rank))
    calls, outs = [], []
    for name, chunks in VARIANTS.items():
        torch.manual_seed(1)
        layer = MoELayer(HIDDEN, FFN, EXPERTS, TOPK, ep_group=dist.group.WORLD, dispatcher="dedup", chunks=chunks)
        torch.nn.init.normal_(layer.router.weight, generator=torch.Generator().manual_seed(2))
        layer.shared = None if name == "shared after" else shared
        calls.append(lambda layer=layer: step(layer, shared, x))
        outs.append(calls[-1]())
    assert all(torch.allclose(out, outs[0], atol=1e-5) for out in outs)
    return turns(repeat, calls)


def step(layer: MoELayer, shared: SharedExperts, x: torch.Tensor) -> torch.Tensor:
    """Forward and backward."""
    x = x.clone().requires_grad_()
    out = layer(x)
    if layer.shared is None:
        out = out + shared(x)
    out.backward(torch.ones_like(out))
    return out.detach()


def computing(rank: int, world: int, repeat: int) -> list[Span]:
    """The same with every expert here and nothing sent: what the processors do anyway."""
    torch.manual_seed(0)
    shared = SharedExperts(HIDDEN, SHARED)
    layer = MoELayer(HIDDEN, FFN, EXPERTS, TOPK, dispatcher="dedup")
    layer.shared = shared
    x = torch.randn(TOKENS, HIDDEN)
    call: Callable[[], object] = lambda: step(layer, shared, x)  # noqa: E731
    call()
    return turns(repeat, [call])[0]


def main() -> None:
    """Measure, print, write."""
    from benchmarks import moe_overlap as jobs  # by this name the ranks find its functions

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mbit", type=float, nargs="+", default=[100.0, 200.0, 400.0])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for mbit in options.mbit:
        with build(wire("mesh", 2, mbit)) as lab, hire(lab) as crew:
            alone = statistics.median(seconds(crew.run(jobs.computing, options.repeat)))
            answers = crew.run(jobs.variants, options.repeat)
        times = {name: seconds([answer[i] for answer in answers]) for i, name in enumerate(VARIANTS)}
        medians = {name: statistics.median(runs) for name, runs in times.items()}
        rows.append({"mbit": mbit, "computing_seconds": alone, "seconds": medians, "runs": times})
        base = medians["shared after"]
        print(f"{mbit:g} Mbit/s a direction; the same on one rank, nothing sent: {alone:.3f} s")
        for name, value in medians.items():
            print(f"  {name:<18}{value:8.3f} s   {base / value:5.2f} x")
    if options.out:
        sizes = {"tokens": TOKENS, "hidden": HIDDEN, "ffn": FFN, "experts": EXPERTS, "topk": TOPK, "shared_ffn": SHARED}
        what = "a layer's forward and backward over links of a set rate: tokens in parts, shared experts beside the exchange"
        record.write(options.out, what, rows, sizes=sizes)


if __name__ == "__main__":
    main()

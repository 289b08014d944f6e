"""Every way of finding columns and every baseline at equal loss: what density, and what time, each needs for it.

One text, one model; a row for each method at each of its settings: loss above dense attention, density, and the CPU seconds of all
attention calls of the pass (columns found and attended to, all with the same torch executor on one thread). At the loss of each of
our settings every other method is read between two of its own, straight in the logarithms of loss and of density or time; a method
whose settings do not enclose that loss has no figure there.
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import pairwise
from typing import Any

from torch import Tensor

from benchmarks.language_model import Model, dense_attention, with_attention
from benchmarks.record import Table
from sparse_attn import AnchorConfig, anchor_attention, baselines, execute

Row = dict[str, Any]
Setting = dict[str, Any]

ANCHOR: dict[str, list[Setting]] = {
    "rescore": [{"theta": t} for t in (4.0, 6.0)],
    "pooled": [{"theta": t} for t in (10.0, 13.0, 16.0)],
}
BASELINES: dict[str, list[Setting]] = {
    "streaming": [{"initial": 128, "local": n} for n in (512, 1024, 2048)],
    "vertical_slash": [{"vertical": a, "slash": b} for a, b in ((200, 300), (400, 800))],
    "flexprefill": [{"gamma": g, "min_budget": n} for g, n in ((0.2, 128), (0.5, 256), (0.7, 256), (0.9, 512))],
    "xattention": [{"threshold": t} for t in (0.8, 0.9, 0.97)],
    "flashprefill": [{"alpha": a} for a in (0.3, 0.1, 0.02)],
}
LEAST = 1e-4
"""Losses below this are read as this: what is left is rounding."""


def one(model: Model, text: str, length: int, method: str, setting: Setting) -> Row:
    """Loss, density and CPU seconds of attention of one method at one setting; "dense" for the model's own."""
    densities: list[float] = []
    spent = [0.0]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        start = time.process_time()
        if method == "dense":
            out, density = dense_attention(q, k, v, scale), 1.0
        elif method in ANCHOR:
            config = AnchorConfig(identify=method, dense="never", **setting)
            out, stats = anchor_attention(q, k, v, config=config, scale=scale, return_stats=True)
            density = stats.density
        else:
            plan = getattr(baselines, method)(q, k, **setting)
            out, density = execute(plan, q, k, v, scale=scale), plan.density
        spent[0] += time.process_time() - start
        densities.append(density)
        return out

    ids = model.ids(text, length)
    with with_attention(model.model, attend):
        hidden = model.hidden(ids)
    row = {"density": sum(densities) / len(densities), "cpu seconds": spent[0]}
    row |= model.compared(hidden, model.dense(text, length), ids)
    costs = f"loss {row['nll']:+.4f}  KL {row['kl']:.4f}  top-1 {row['top1']:.4f}  {row['cpu seconds']:.1f} s"
    print(f"{method:>16} {setting!s:>36} density {row['density']:.3f}  {costs}", flush=True)
    return row


def at_loss(rows: list[Row], loss: float, what: str) -> float | None:
    """A method's density or seconds where it would lose so much; None outside its settings."""
    points = sorted((math.log(max(row["nll"], LEAST)), math.log(row[what])) for row in rows)
    x = math.log(max(loss, LEAST))
    for (a, low), (b, high) in pairwise(points):
        if a <= x <= b:
            return math.exp(low + (high - low) * (x - a) / max(b - a, 1e-12))
    return None


def at_equal_loss(rows: list[Row]) -> list[Row]:
    """Each setting of `rescore` beside every other method at its loss: what they need, as multiples of ours."""
    found = []
    for ours in (row for row in rows if row["method"] == "rescore"):
        row = {"theta": ours["setting"]["theta"], "loss": ours["nll"]}
        for what in ("density", "cpu seconds"):
            others = {
                name: at_loss([r for r in rows if r["method"] == name], ours["nll"], what)
                for name in (*ANCHOR, *BASELINES)
                if name != "rescore"
            }
            ratios = {name: value / ours[what] for name, value in others.items() if value is not None}
            row[what] = {"rescore": ours[what], "other / rescore": ratios}
        print(row, flush=True)
        found.append(row)
    return found


def sweep(model: Model, args: argparse.Namespace, table: Table) -> Row:
    """All methods, or those that are named, one setting after the other."""
    wanted = {"dense": [{}]} | ANCHOR | BASELINES
    for name in args.methods or wanted:
        for setting in wanted[name]:
            place = {"method": name, "setting": setting}
            table.row(place, lambda: one(model, args.text, args.length, **place))  # noqa: B023
    return {"at equal loss": at_equal_loss(table.rows)}

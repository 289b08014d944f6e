"""The same input on one rank: are the logits the same, and the tokens? With plain attention, or over a sparse run's own pairs.

Rank 0 takes the reduced sequence as it left the reduction (not as the ranks received it), runs transformers' own sdpa and
eager attention over it and the written tokens in one pass (a model upcycled to experts: with its dense networks), and compares

    written     logits of every position that produced a token: at most `tolerance` apart
    all         logits of every position of the prompt: at most four times as far apart as sdpa and eager are from each
                other, or `tolerance` where that is more
    tokens      what one rank would have written; where it differs, the one-rank gap between its best two logits

A sparse run is compared with one rank's attention over the same pairs (`launch.verify_sparse`); where no layer ran sparse, as
at theta = infinity, with plain attention like any other.

In a 16-bit type two correct runs differ by far more than float32's tolerance; there it is raised to twice the difference of
sdpa and eager on the written positions. The tolerances that were applied stand in the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from launch.config import GenerateConfig
from launch.generate import Answer, Writer
from launch.models.base import VISUAL, Adapter, Prompt, splice
from launch.sparse import SparseRun
from launch.spread import Ownership
from launch.verify_sparse import Judge, alone, beside_dense, gathered_plans
from launch.watch import Kept
from tokenring.layout import Layout
from tokenring.transport import Transport

CHUNK_ROWS = 256
APART = 4
"""Over many positions the largest differences of correct runs, cut between ranks in other ways, were 0.6 to 2.2 times that of
sdpa and eager. One pair left out of one layer moved logits 240 times as far in the median, in 23 of 24 cases 13 times or more."""


def verify(
    adapter: Adapter,
    short: Prompt,
    kept: Kept,
    who: Ownership,
    layout: Layout,
    answer: Answer,
    config: GenerateConfig,
    tolerance: float,
    runtime: Transport,
    sparse: SparseRun | None = None,
) -> dict[str, Any] | None:
    """Compare on rank 0; the others only hand over what they hold. Collective."""
    x = who.gather(kept.x, runtime)
    planes = None if kept.planes is None else who.gather(kept.planes, runtime)
    assert answer.hidden is not None
    hidden = layout.gather(answer.hidden, runtime)
    plans = {} if sparse is None else gathered_plans(sparse, layout.total, runtime)
    if runtime.rank != 0:
        return None
    reference = {kind: _alone(adapter, short, x, planes, answer.ids[:-1], kind) for kind in ("sdpa", "eager")}
    length = layout.total
    prompt, written = slice(0, length), slice(length - 1, None)
    if answer.hidden.dtype in (torch.bfloat16, torch.float16):
        own = _largest(adapter, reference["eager"][:, written], reference["sdpa"][:, written])
        tolerance = max(tolerance, 2 * own)
    dense, own, extra = reference["sdpa"], _largest(adapter, *(reference[k][:, prompt] for k in reference)), {}
    expected = dense
    if any(plan is not None for plan in plans.values()):
        judge = Judge(sparse, plans)
        expected = alone(adapter, short, x, planes, answer.ids[:-1], judge)
        same = _written(adapter, dense[:, written], answer, config, tolerance)["same_tokens"]
        distance = beside_dense(adapter, hidden, dense[:, prompt], same, CHUNK_ROWS)
        extra = {"beside_dense": distance, **judge.verdict(hidden.dtype)}
    return {
        **_written(adapter, expected[:, written], answer, config, tolerance),
        **_everywhere(adapter, hidden, expected[:, prompt], own, tolerance),
        "tolerance": tolerance,
        **extra,
    }


def _alone(adapter: Adapter, short: Prompt, x: Tensor, planes: Tensor | None, written: list[int], kind: str) -> Tensor:
    """Hidden states of the prompt and the written tokens on one rank, transformers' own attention."""
    later = torch.tensor(written, dtype=torch.int64)
    ids = torch.cat([short.input_ids, later])
    steps = torch.arange(len(written)).expand(short.positions.shape[0], -1) + short.next_position
    positions = torch.cat([short.positions, steps], dim=1)
    rows = (ids == VISUAL).nonzero().flatten() if planes is not None else None
    former = adapter.text_model.config._attn_implementation
    adapter.text_model.set_attn_implementation(kind)
    try:
        with adapter.alone():
            return adapter.forward(splice(adapter, ids, x), positions, None, planes, rows)
    finally:
        adapter.text_model.set_attn_implementation(former)


def _written(
    adapter: Adapter, rows: Tensor, answer: Answer, config: GenerateConfig, tolerance: float
) -> dict[str, Any]:
    writer, differences, first = Writer(config), [], None
    for number, (token, logits) in enumerate(zip(answer.ids, answer.logits)):
        alone = adapter.logits(rows[:, number])[0].cpu()
        differences.append((alone - logits).abs().max().item())
        picked = writer.pick(alone)
        if picked != token and first is None:
            best = alone.topk(2).values
            first = {"position": number, "token": token, "alone": picked, "gap": (best[0] - best[1]).item()}
    same = first is None
    close = max(differences) <= tolerance
    excused = first is not None and first["gap"] < tolerance
    return {
        "max_logit_diff": max(differences),
        "same_tokens": same,
        "first_difference": first,
        "written_within_tolerance": close and (same or excused),
    }


def _everywhere(adapter: Adapter, hidden: Tensor, expected: Tensor, own: float, tolerance: float) -> dict[str, Any]:
    spread = _largest(adapter, hidden, expected)
    allowed = max(APART * own, tolerance)
    return {
        "max_logit_diff_all": spread,
        "sdpa_eager_diff_all": own,
        "tolerance_all": allowed,
        "all_within_tolerance": spread <= allowed,
    }


def _largest(adapter: Adapter, a: Tensor, b: Tensor) -> float:
    """Largest difference of the logits of two runs of hidden states, a few rows at a time."""
    runs = zip(a.split(CHUNK_ROWS, dim=1), b.split(CHUNK_ROWS, dim=1))
    return max((adapter.logits(x) - adapter.logits(y)).abs().max().item() for x, y in runs)

"""A sparse run on one rank: attention over exactly the pairs that the ranks chose, and how far that is from dense attention.

The ranks' columns travel to rank 0 and are given to one-rank attention as a plan, so that what is compared is the same sum of
the same pairs; a column on the edge of theta, which rounding may tip either way, then spoils no comparison. What one rank would
have chosen by itself is counted beside it, and the distance from dense attention is stated: a figure, not a failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from launch.models.base import Adapter, Prompt, splice
from launch.sparse import SparseRun
from sparse_attn import AnchorConfig, Geometry, StripePlan, plan
from tokenring.transport import Transport

TIPPED = {torch.float32: 0.01}
"""Share of the columns that one rank may choose otherwise: rounding tips those on the edge of theta."""
TIPPED_HALF = 0.1
"""The same in 16-bit types."""


def gathered_plans(sparse: SparseRun, length: int, runtime: Transport) -> dict[int, StripePlan | None]:
    """The columns of all ranks as one-device plans of the whole sequence, a layer each; None where it was dense. Collective."""
    plans = {}
    for layer, mine in sparse.plans().items():
        told = torch.empty(0, dtype=torch.int64) if mine is None else _flat(mine)
        parts = [part.cpu() for part in runtime.all_gather(told.to(sparse.device), control=True)]
        plans[layer] = None if mine is None else _joined(parts, mine, length, sparse.keep)
    return plans


def _flat(mine: StripePlan) -> Tensor:
    """[parts, group of each part, columns of each list, all columns]."""
    size = mine.geometry.rows
    groups = torch.tensor([group.diagonal // size for group in mine.geometry.groups], dtype=torch.int64)
    return torch.cat([torch.tensor([len(groups)]), groups, mine.counts.flatten(), mine.indices.cpu().long()])


def _joined(parts: Sequence[Tensor], mine: StripePlan, length: int, keep: Tensor | None) -> StripePlan:
    g, heads = mine.geometry, mine.heads
    whole = Geometry((((0, length), (0, length)),), g.block, g.step, g.initial, g.window)
    lists: dict[int, tuple[Tensor, ...]] = {}
    for part in parts:
        count = int(part[0])
        groups, rest = part[1 : count + 1].tolist(), part[count + 1 :]
        columns = rest[count * heads :].split(rest[: count * heads].tolist())
        for number, group in enumerate(groups):
            found = columns[number * heads : (number + 1) * heads]
            known = lists.setdefault(group, found)
            if any(not torch.equal(a, b) for a, b in zip(known, found)):
                raise RuntimeError(f"ranks that share group {group} attended to different columns of it")
    flat = [column for group in range(len(whole.groups)) for column in lists[group]]
    return StripePlan.of_columns(
        whole, (1, mine.q_heads, mine.kv_heads), mine.share, flat, keep, "the ranks' own columns"
    )


class Judge:
    """Counts where one rank would have chosen other columns."""

    def __init__(self, sparse: SparseRun, plans: Mapping[int, StripePlan | None]) -> None:
        self.sparse, self.plans = sparse, plans
        self.columns = self.other = 0

    def watch(self, layer: int, q: Tensor, k: Tensor, scale: float | None) -> None:
        """See `sparse_prefill`."""
        given = self.plans[layer]
        if given is None:
            return
        config: AnchorConfig = replace(self.sparse.of(layer), theta=self.sparse.calls[layer].theta, dense="never")
        sizes = {"block": given.geometry.block, "step": given.geometry.step}
        alone = plan(q, k, config=replace(config, **sizes), scale=scale, keep=self.sparse.keep)
        a, b = (_cells(found) for found in (given, alone))
        self.columns += len(a)
        self.other += len(a) + len(b) - 2 * int(torch.isin(a, b, assume_unique=True).sum())

    def verdict(self, dtype: torch.dtype) -> dict[str, Any]:
        """For the report."""
        allowed = TIPPED.get(dtype, TIPPED_HALF)
        share = self.other / max(1, self.columns)
        told = {"columns": self.columns, "columns_chosen_otherwise": self.other, "columns_allowed_share": allowed}
        return told | {"columns_within_tolerance": share <= allowed}


def _cells(found: StripePlan) -> Tensor:
    """int64: one number for each column of each list."""
    lists = torch.repeat_interleave(torch.arange(len(found.indptr) - 1), found.indptr.diff())
    return lists * found.geometry.keys + found.indices.cpu().long()


def alone(
    adapter: Adapter, short: Prompt, x: Tensor, planes: Tensor | None, written: list[int], judge: Judge
) -> Tensor:
    """Hidden states of the prompt under the ranks' plans, and of the written tokens exactly, on one rank."""
    from transformers import DynamicCache

    from sparse_attn.integrations.huggingface import sparse_prefill

    cache = DynamicCache(config=adapter.text_model.config)
    rows = short.visual_slots if planes is not None else None
    former = adapter.text_model.config._attn_implementation
    adapter.text_model.set_attn_implementation("sdpa")
    try:
        with adapter.alone():
            with sparse_prefill(adapter.text_model, plans=judge.plans, watch=judge.watch):
                prompt = adapter.forward(splice(adapter, short.input_ids, x), short.positions, cache, planes, rows)
            if not written:
                return prompt
            steps = torch.arange(len(written)).expand(short.positions.shape[0], -1) + short.next_position
            later = adapter.forward(adapter.embed(torch.tensor(written))[None], steps, cache)
    finally:
        adapter.text_model.set_attn_implementation(former)
    return torch.cat([prompt, later], dim=1)


def beside_dense(adapter: Adapter, hidden: Tensor, dense: Tensor, same_tokens: bool, chunk: int) -> dict[str, Any]:
    """How far the sparse prompt is from the dense one: logits, mean Kullback-Leibler divergence (nats), likeliest tokens."""
    apart, divergence, agree = 0.0, 0.0, 0
    for a, b in zip(hidden.split(chunk, dim=1), dense.split(chunk, dim=1)):
        mine, theirs = adapter.logits(a)[0], adapter.logits(b)[0]
        apart = max(apart, (mine - theirs).abs().max().item())
        agree += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
        p, q = theirs.double().log_softmax(-1), mine.double().log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum())
    rows = hidden.shape[1]
    return {"max_logit_diff": apart, "kl": divergence / rows, "top1": agree / rows, "same_tokens": same_tokens}

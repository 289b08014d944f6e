"""Prefill over the ranks, then one token at a time against the spread cache.

The rank that holds the last row of the prompt hands its hidden state to all; from then on every rank computes the same row
and appends it to the cache of one rank. Rank 0 picks each token and tells the others, so that ranks can never part ways.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from launch.config import GenerateConfig
from launch.models.base import Adapter
from launch.spread import Part
from launch.stages import Stages
from tokenring.layout import Layout
from tokenring.transport import Transport, trace


@dataclass
class Answer:
    """What was written, and what a comparison needs: logits of each written token (rank 0), hidden states of the prompt."""

    ids: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    hidden: Tensor | None = None
    first_token_at: float = 0.0
    """On the log's clock."""


class Writer:
    """Draws tokens from logits; the same seed draws the same tokens from the same logits."""

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.random = torch.Generator().manual_seed(config.seed)

    def pick(self, logits: Tensor) -> int:
        """One token id from (vocabulary,) logits: the likeliest, lowest id on a tie; or a draw at temperature above 0."""
        if self.config.temperature == 0:
            return int(logits.argmax())
        scores = logits.double().cpu() / self.config.temperature
        order = scores.argsort(descending=True, stable=True)
        if self.config.top_k is not None:
            order = order[: self.config.top_k]
        shares = scores[order].softmax(0)
        if self.config.top_p is not None:
            reached = shares.cumsum(0) - shares < self.config.top_p
            order, shares = order[reached], shares[reached]
        return int(order[torch.multinomial(shares, 1, generator=self.random)])


def write(
    adapter: Adapter,
    part: Part,
    layout: Layout,
    next_position: int,
    cache: Any,
    config: GenerateConfig,
    runtime: Transport,
    stages: Stages,
    *,
    keep: bool,
) -> Answer:
    """Prefill this rank's part and write the answer; inside `sequence_parallel`. With `keep`, what a comparison needs."""
    answer, writer = Answer(), Writer(config)
    with stages.span("prefill"):
        with trace(runtime) as recorded:
            hidden = adapter.forward(part.embeds, part.positions, cache, part.planes, part.visual_rows)
        row = _last_row(hidden, layout, runtime)
        token = _next(adapter, row, writer, answer, runtime, keep)
    stages.add(recorded.events)
    answer.first_token_at = stages.log.clock()
    answer.hidden = hidden if keep else None
    stages.log.stage("decode")
    stages.log.progress(1, config.max_new_tokens)
    while len(answer.ids) < config.max_new_tokens and token not in adapter.eos_ids:
        with stages.span("decode"):
            position = torch.full((adapter.position_axes, 1), next_position + len(answer.ids) - 1, dtype=torch.int64)
            row = adapter.forward(adapter.embed(torch.tensor([token]))[None], position, cache)
            token = _next(adapter, row, writer, answer, runtime, keep)
        stages.log.progress(len(answer.ids), config.max_new_tokens)
    return answer


def _last_row(hidden: Tensor, layout: Layout, runtime: Transport) -> Tensor:
    """(1, 1, hidden): the state of the prompt's last row, from the rank that holds it."""
    where = [(layout.positions(rank) == layout.total - 1).nonzero() for rank in range(layout.world)]
    source = next(rank for rank, found in enumerate(where) if found.numel())
    row = torch.empty_like(hidden[:, :1])
    if runtime.rank == source:
        row = hidden[:, int(where[source])][:, None].contiguous()
    return runtime.broadcast(row, source)


def _next(adapter: Adapter, row: Tensor, writer: Writer, answer: Answer, runtime: Transport, keep: bool) -> int:
    chosen = torch.zeros(1, dtype=torch.int64, device=row.device)
    if runtime.rank == 0:
        logits = adapter.logits(row[:, -1])[0]
        chosen[0] = writer.pick(logits)
        if keep:
            answer.logits.append(logits.cpu())
    token = int(runtime.broadcast(chosen, 0, control=True))
    answer.ids.append(token)
    return token

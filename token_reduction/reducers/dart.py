"""DART: a few pivots, and for each the tokens least like it.

    pivots   the tokens with the largest L1 norm
    others   each pivot adds its share of the tokens with the smallest cosine to it that nobody has taken

Source: DART, "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More" (EMNLP 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.exact import marked, rows_at, spread, top, unit_rows
from token_reduction.options import COUNT, Limits, Range
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class Dart(UnitReducer):
    """Keep k tokens of each item.

    Args:
        pivots: how many, among the kept tokens.
        text_pivots: rows of `text` with the largest norm that choose as well and are not kept; in the space of what is compared.
        keys: compare keys instead of features.
        variant: "best" takes 8 pivots among the tokens. "paper" and "released" take 4 of them and 4 text pivots.

    Scores: none.
    """

    pivots: int | None = None
    text_pivots: int | None = None
    keys: bool = False
    limits: ClassVar[Limits] = {"pivots": COUNT, "text_pivots": Range(0)}
    name: ClassVar[str] = "dart"
    cost: ClassVar[str] = "O(n D)"
    source: ClassVar[str] = "DART, duplication-aware reduction of tokens"
    form: ClassVar[str] = "authors'"
    flat: ClassVar[bool] = True

    @property
    def pivot_counts(self) -> tuple[int, int]:
        """Pivots among the tokens and in the text."""
        usual = (8, 0) if self.variant == "best" else (4, 4)
        return (
            usual[0] if self.pivots is None else self.pivots,
            usual[1] if self.text_pivots is None else self.text_pivots,
        )

    @property
    def text_space(self) -> str:
        return "keys" if self.keys else "x"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"keys"} if self.keys else set()) | ({"text"} if self.pivot_counts[1] else set())

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        own, words = self.pivot_counts
        fewest = [min(words, len(text)) for text in batch.texts] if words else []
        if len(set(fewest)) > 1:  # each unit has as many directions
            return batch.by(fewest, lambda part: self.select(part, count))
        raw = batch.channels["keys"].flatten(2) if self.keys else batch.x
        q = batch.units("keys" if self.keys else None)
        first = top(raw.double().abs().sum(-1), min(own, count))
        directions = rows_at(q, first)
        if words:
            directions = torch.cat([directions, torch.stack([self.loudest(text.to(q)) for text in batch.texts])], 1)
        taken = torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device).scatter_(1, first, True)
        for direction, share in enumerate(spread(count - first.shape[1], directions.shape[1])):
            alike = (q @ directions[:, direction, :, None])[..., 0].masked_fill(taken, torch.inf)
            taken.scatter_(1, top(-alike, share), True)
        return [Selection(kept) for kept in marked(taken)]

    def loudest(self, text: Tensor) -> Tensor:
        """Unit rows of the text pivots."""
        return unit_rows(text)[top(text.double().abs().sum(1), self.pivot_counts[1])]

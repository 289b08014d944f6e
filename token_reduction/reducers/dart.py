"""DART: a few pivots, and for each the tokens least like it.

    pivots   the tokens with the largest L1 norm
    others   each pivot adds its share of the tokens with the smallest cosine to it that nobody has taken

Source: DART, "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More" (EMNLP 2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from token_reduction.batch import Batch, Selection
from token_reduction.exact import spread, top, unit_rows
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class Dart(UnitReducer):
    """Keep k tokens of each item.

    Args:
        pivots: how many, among the kept tokens.
        text_pivots: rows of `text` with the largest norm that choose as well and are not kept.
        keys: compare keys instead of features.
        variant: "best" takes 8 pivots among the tokens. "paper" and "released" take 4 of them and 4 text pivots.

    Scores: none.
    """

    pivots: int | None = None
    text_pivots: int | None = None
    keys: bool = False
    name: ClassVar[str] = "dart"
    cost: ClassVar[str] = "O(n D)"
    source: ClassVar[str] = "DART, duplication-aware reduction of tokens"
    form: ClassVar[str] = "authors'"
    flat: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pivot_counts[0] < 1 or self.pivot_counts[1] < 0:
            raise ValueError(
                f"dart needs at least 1 pivot and no negative number, got {self.pivot_counts}; 8 and 0 are usual"
            )

    @property
    def pivot_counts(self) -> tuple[int, int]:
        """Pivots among the tokens and in the text."""
        usual = (8, 0) if self.variant == "best" else (4, 4)
        return (
            usual[0] if self.pivots is None else self.pivots,
            usual[1] if self.text_pivots is None else self.text_pivots,
        )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"keys"} if self.keys else set()) | ({"text"} if self.pivot_counts[1] else set())

    def select_one(self, batch: Batch, count: int) -> Selection:
        raw = (batch.channels["keys"].flatten(2) if self.keys else batch.x)[0]
        q, (own, words) = batch.units("keys" if self.keys else None)[0], self.pivot_counts
        first = top(raw.double().abs().sum(1), min(own, count))
        directions = q[first]
        if words:
            text = batch.text.to(q.device)
            loudest = top(text.double().abs().sum(1), min(words, len(text)))
            directions = torch.cat([directions, unit_rows(text)[loudest]])
        taken = torch.zeros(len(q), dtype=torch.bool, device=q.device)
        taken[first] = True
        for direction, share in zip(directions, spread(count - len(first), len(directions))):
            alike = (q @ direction).masked_fill(taken, torch.inf)
            taken[top(-alike, share)] = True
        return Selection(taken.nonzero()[:, 0])

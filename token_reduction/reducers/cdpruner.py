"""CDPruner: the most probable set of a determinantal point process whose kernel knows the question.

    L_ij = r_i cos(x_i, x_j) r_j,   r = min-max of the relevance, -mean_m cos(v_i, z_m);   greedy MAP

Source: CDPruner, "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from token_reduction.batch import Batch, Selection
from token_reduction.exact import unit_rows
from token_reduction.options import COUNT, Limits
from token_reduction.selectors.diversity import dpp
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class CDPruner(UnitReducer):
    """Keep k tokens of each item, diverse and relevant.

    Args:
        relevance: condition on `text` through `patches`, both in the space that image and text share. False: the plain DPP
            of the tokens, which needs neither.
        block: most choices that are made diverse against each other; memory is n x min(block, D). None: D.

    The sign follows the publication: the encoder's token-text cosines are negative evidence (-mean), as its authors found for
    CLIP's patches. Scores: r. Variants: one algorithm; best, paper and released are the same.
    """

    relevance: bool = True
    block: int | None = None
    limits: ClassVar[Limits] = {"block": COUNT}
    name: ClassVar[str] = "cdpruner"
    cost: ClassVar[str] = "O(k n (D + min(k, D))) time, O(n D) memory"
    source: ClassVar[str] = "CDPruner, conditional diversity by greedy DPP MAP"
    form: ClassVar[str] = "authors'"
    flat: ClassVar[bool] = True
    text_space: ClassVar[str] = "patches"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"patches", "text"}) if self.relevance else frozenset()

    def work(self, item: tuple[int, int, int], count: int, width: int) -> float:
        return float(item[0] * item[1] * item[2]) * count * (width + min(count, self.block or width))

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        q = batch.units()
        quality = torch.ones_like(q[..., 0])
        if self.relevance:
            seen = batch.units("patches")
            text = [unit_rows(each.to(q.device)) for each in batch.texts]
            value = -torch.stack([(rows @ words.mT).mean(1) for rows, words in zip(seen, text)])
            low, high = value.amin(1, keepdim=True), value.amax(1, keepdim=True)
            quality = (value - low + 1e-6) / (high - low + 1e-6)
        kept = dpp(q, count, quality, self.block).sort(-1).values
        return [Selection(k, scores=r) for k, r in zip(kept, quality)]

"""CDPruner: the most probable set of a determinantal point process whose kernel knows the question.

    L_ij = r_i cos(x_i, x_j) r_j,   r = min-max of the relevance, -mean_m cos(v_i, z_m);   greedy MAP

Source: CDPruner, "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from token_reduction.batch import Batch, Selection
from token_reduction.exact import unit_rows
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
    name: ClassVar[str] = "cdpruner"
    cost: ClassVar[str] = "O(k n (D + min(k, D))) time, O(n D) memory"
    source: ClassVar[str] = "CDPruner, conditional diversity by greedy DPP MAP"
    form: ClassVar[str] = "authors'"
    flat: ClassVar[bool] = True
    text_space: ClassVar[str] = "patches"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"patches", "text"}) if self.relevance else frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block is not None and self.block < 1:
            raise ValueError(f"block is a number of choices, at least 1, got {self.block!r}; None takes the width")

    def work(self, item: tuple[int, int, int], count: int, width: int) -> float:
        return float(item[0] * item[1] * item[2]) * count * (width + min(count, self.block or width))

    def select_one(self, batch: Batch, count: int) -> Selection:
        q = batch.units()[0]
        quality = torch.ones_like(q[:, 0])
        if self.relevance:
            seen, text = batch.units("patches")[0], unit_rows(batch.text.to(q.device))
            value = -(seen @ text.mT).mean(1)
            quality = (value - value.min() + 1e-6) / (value.max() - value.min() + 1e-6)
        return Selection(dpp(q, count, quality, self.block).sort().values, scores=quality)

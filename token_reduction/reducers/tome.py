"""ToMe: merge the tokens whose keys are most alike, a few per round, by the mean of all tokens in them.

    round: A = even rows, B = odd rows; the r closest pairs join, weighted by how many tokens each row holds

Source: Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023), section 3. In the encoder each layer is a round; here
the rounds follow each other, on the keys of one layer. `Reduction.log_sizes` is its proportional attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from token_reduction.batch import Batch, Selection
from token_reduction.options import COUNT, Limits
from token_reduction.reducers.aim import rows_of
from token_reduction.selectors.pairs import merge_rounds
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class ToMe(UnitReducer):
    """Keep k rows of each frame, every row the mean of its tokens. Keys are averaged over heads where these are told apart.

    Args:
        per_round: tokens that one round takes away.

    Variants: one algorithm; best, paper and released are the same. Scores: none.
    """

    per_round: int = 16
    limits: ClassVar[Limits] = {"per_round": COUNT}
    name: ClassVar[str] = "tome"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    cost: ClassVar[str] = "O(T N^3 D / r)"
    source: ClassVar[str] = "ToMe, token merging"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "authors'"
    scope: ClassVar[str] = "frame"

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        keys = batch.channels["keys"]
        keys = keys.double().mean(2) if keys.dim() == 4 else keys.flatten(2)
        merged = merge_rounds(keys, count, self.per_round, sized=True)
        return [rows_of(*parts) for parts in zip(*merged)]

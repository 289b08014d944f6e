"""MMTok: tokens that cover the question and the picture at once.

    P = softmax_rows(cos(Z, X) / t_text) / m          question words over tokens
    Q = softmax_rows(cos(V, V) / t_vision) / n        picture over itself
    greedy: gain_j = sum_i max(C_ij - best_i, 0),     C = [P; alpha Q]

Source: MMTok, "Multimodal Coverage Maximization for Efficient Inference of VLMs", method section.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from token_reduction.batch import Batch, Selection
from token_reduction.exact import unit_rows
from token_reduction.selectors.coverage import Cover, greedy
from token_reduction.unit_reducer import UnitReducer

_BITS = 40  # Q's entries are near 1/n^2


@dataclass(frozen=True, kw_only=True)
class MMTok(UnitReducer):
    """Keep k tokens of each item by greedy coverage of `text` (m, D: the question's input embeddings, cleaned) and vision.

    Args:
        alpha: weight of the picture against the question.
        vision_temperature, text_temperature: t_vision, t_text. The released inner function says 0.01 for the text where
            its constructor says 0.02: variant "released" takes 0.01 unless told otherwise, the others 0.02.

    V is the tokens themselves; to use features before the projector, make them x and index the projected by the result.
    Scores: the gain of a kept token, 0 for the others.
    """

    alpha: float = 0.5
    vision_temperature: float = 0.2
    text_temperature: float | None = None
    name: ClassVar[str] = "mmtok"
    needs: ClassVar[frozenset[str]] = frozenset({"text"})
    cost: ClassVar[str] = "O(n^2 D) time, O(n D) memory"
    source: ClassVar[str] = "MMTok, multimodal coverage maximization"
    form: ClassVar[str] = "authors'"

    def work(self, item: tuple[int, int, int], count: int, width: int) -> float:
        return float(item[0] * item[1] * item[2]) ** 2 * width

    def select_one(self, batch: Batch, count: int) -> Selection:
        q, z = batch.units()[0], unit_rows(batch.text.to(batch.x.device))
        t_text = self.text_temperature or (0.01 if self.variant == "released" else 0.02)
        p = torch.softmax(z @ q.mT / t_text, -1) / len(z)
        total = torch.cat([((rows @ q.mT) / self.vision_temperature).logsumexp(-1) for rows in q.split(512)])

        def columns(js: torch.Tensor) -> torch.Tensor:
            share = torch.exp((q[js] @ q.mT) / self.vision_temperature - total) / len(q)
            return torch.cat([p.mT[js], self.alpha * share], 1)

        cover = Cover(columns, len(z) + len(q), len(q), q.new_zeros(len(q)), 0.0, _BITS, torch.int64)
        order, gains = greedy(cover, count)
        return Selection(order.sort().values, scores=torch.zeros_like(total).index_put_((order,), gains))
